"""Features of the Inception network of FID, with the three ways to resize that clean-fid knows."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.weights import Weights, WeightsFile

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

# The network of the TensorFlow archive inception-2015-12-05, as StyleGAN2-ADA's TorchScript and as a state dict.
TORCHSCRIPT = WeightsFile(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    96,
)
STATE_DICT = WeightsFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    96,
    aliases=("weights-inception-2015-12-05-6726825d.pth",),  # torch-fidelity's name for it
)
RANDOM = "inception-random.pth"
RESIZES = {
    "clean": "clean (PIL bicubic, antialiased, not rounded)",
    "legacy_pytorch": "legacy_pytorch (torch bilinear, no antialiasing)",
    "legacy_tensorflow": "legacy_tensorflow (TensorFlow 1 bilinear, no antialiasing)",
}
WIDTHS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008}


@dataclass(frozen=True)
class Inception(Features):
    """Pooled features ("2048") or class scores without bias ("logits_unbiased") of Inception-v3.

    mode: how pictures are resized to 299 pixels, and with it who computes the features, as the field does: "clean" is
    clean-fid over the TorchScript network, "legacy_pytorch" clean-fid over the state dict, "legacy_tensorflow"
    torch-fidelity over the state dict (class scores exist there only).  label: "" for the published weights.
    """

    mode: str = "clean"
    layer: str = "2048"
    label: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, ("inception", self.label)))

    @property
    def width(self) -> int:
        return WIDTHS[self.layer]

    @property
    def resize(self) -> str:
        return RESIZES[self.mode]

    @property
    def key(self) -> str:
        return f"{super().key}-{self.mode}-{self.layer}"

    def metric_name(self, general: str, standard: str) -> str:
        if self.label:
            return super().metric_name(general, standard)
        return standard if self.mode == "clean" else f"{standard}-{self.mode.replace('_', '-')}"

    def provenance(self) -> dict[str, str]:
        return {
            "package": package("torch_fidelity" if self.mode == "legacy_tensorflow" else "clean-fid"),
            "backbone": f"Inception-v3 (2015-12-05), {self.layer}",
            "weights": self.weights.path.name,
            "weights_sha256": self.weights.sha256,
            "resize": self.resize,
        }

    def load(self) -> None:
        _ = self._torch_fidelity if self.mode == "legacy_tensorflow" else self._clean_fid

    @torch.no_grad()
    def extract(self, pictures: UInt8[Tensor, "B 3 height width"]) -> Float32[Tensor, "B width"]:
        if self.mode == "legacy_tensorflow":
            return self._torch_fidelity(pictures.to(self.device))[0].float().cpu()
        resized = [self._resizer(picture.permute(1, 2, 0).cpu().numpy()) for picture in pictures]
        batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self.device)
        return self._clean_fid(batch).reshape(len(pictures), -1).float().cpu()

    @cached_property
    def _torch_fidelity(self) -> Any:
        module = optional("torch_fidelity.feature_extractor_inceptionv3", self.name)
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", [self.layer], feature_extractor_weights_path=str(self.weights.path)
        )
        return network.to(self.device)

    @cached_property
    def _resizer(self) -> Callable[[np.ndarray], np.ndarray]:
        with warnings.catch_warnings():  # clean-fid silences every warning of the process for good
            return optional("cleanfid.resize", self.name).build_resizer(self.mode)

    @cached_property
    def _clean_fid(self) -> Callable[[Tensor], Tensor]:
        build = optional("cleanfid.features", self.name)
        if self.mode == "clean":
            with _named(self.weights.path, TORCHSCRIPT.name) as folder:
                return build.InceptionV3W(str(folder), download=False).to(self.device).eval()
        with _named(self.weights.path, STATE_DICT.name, "checkpoints") as folder, _torch_hub(folder.parent):
            return build.feature_extractor("pytorch_inception", self.device, use_dataparallel=False)


@contextlib.contextmanager
def _named(path: Path, name: str, folder: str = "weights") -> Iterator[Path]:
    """A folder in which the file `path` has the one name that a package looks for."""
    with tempfile.TemporaryDirectory() as top:
        place = Path(top) / folder
        place.mkdir()
        (place / name).symlink_to(path.resolve())
        yield place


@contextlib.contextmanager
def _torch_hub(folder: Path) -> Iterator[None]:
    """torch.hub looks for its checkpoints under `folder` while the context is open."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(before)


def inception(
    weights: Weights, device: torch.device, used_by: str, mode: str = "clean", layer: str = "2048"
) -> Inception:
    """Return the extractor with the published weights; raises as `Weights.find` does."""
    found = weights.find(TORCHSCRIPT if mode == "clean" else STATE_DICT, used_by)
    return Inception(found, device, mode, layer)


def random_inception(weights: Weights, device: torch.device, used_by: str, layer: str = "2048") -> Inception:
    """Return the extractor with a state dict of the user's own, `inception-random.pth`: no standard features."""
    return Inception(weights.find_own(RANDOM, used_by), device, "legacy_tensorflow", layer, "random")
