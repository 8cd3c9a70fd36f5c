"""LPIPS (Zhang et al. 2018) of each picture against its own reference, by the lpips package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.evaluation.metrics.contract import check_batch
from qdiff.evaluation.metrics.loading import loading
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.per_picture import PerPicture
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.weights import Found, Weights, WeightsFile, sha256_of

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

_URL = "https://download.pytorch.org/models/"


def _trunk(name: str, sha256: str, megabytes: int) -> WeightsFile:
    """torchvision's file, which has the first eight digits of its hash in its name."""
    file = f"{name}-{sha256[:8]}.pth"
    return WeightsFile(file, _URL + file, sha256, megabytes)


# The trunks of torchvision; the linear layers over them come with the lpips package.
TRUNKS = {
    "alex": _trunk("alexnet-owt", "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", 244),
    "vgg": _trunk("vgg16", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553),
    "squeeze": _trunk("squeezenet1_1", "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b", 5),
}
# In smaller pictures the second pooling of AlexNet finds no window.
MINIMUM_SIDE = 31


@dataclass(frozen=True)
class Lpips(PerPicture):
    """Learned perceptual distance, version 0.1.

    net: "alex", "vgg" or "squeeze".  trunk: a state dict of torchvision's network.  label: "" for the published trunk,
    and otherwise what its weights are, which then is part of the metric's name.
    """

    net: str
    trunk: Found
    device: torch.device
    label: str = ""

    needs_reference = True
    higher_is_better = False
    minimum_side = MINIMUM_SIDE

    @property
    def name(self) -> str:
        return "-".join(filter(None, ("lpips", self.net, self.label)))

    @property
    def feature_key(self) -> str:
        return f"{self.name}-{self.trunk.sha256[:12]}"

    def provenance(self) -> dict[str, str]:
        linear = Path(str(optional("lpips", self.name).__file__)).parent / "weights" / "v0.1" / f"{self.net}.pth"
        return {
            "package": package("lpips"),
            "backbone": f"torchvision {self.net}, LPIPS 0.1",
            "weights": self.trunk.path.name,
            "weights_sha256": self.trunk.sha256,
            "linear_sha256": sha256_of(linear),
            "resize": "none",
        }

    def prepare(self) -> None:
        with loading(self.trunk, self.name):
            _ = self._network

    @torch.no_grad()
    def rows(
        self,
        candidate: UInt8[Tensor, "B 3 height width"],
        reference: UInt8[Tensor, "B 3 height width"] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Float32[Tensor, "B 1"]:
        check_batch(self, candidate, reference, prompts)
        first, second = (
            pictures.to(self.device).float() / 127.5 - 1 for pictures in (candidate, reference) if pictures is not None
        )
        return self._network(first, second).reshape(-1, 1).float().cpu()

    @cached_property
    def _network(self) -> nn.Module:
        network = optional("lpips", self.name).LPIPS(net=self.net, pnet_rand=True, verbose=False)
        trunk = torch.load(self.trunk.path, map_location="cpu", weights_only=True)
        network.net.load_state_dict({key: trunk[_torchvision_key(key)] for key in network.net.state_dict()})
        return network.eval().requires_grad_(False).to(self.device)


def _torchvision_key(key: str) -> str:
    """The package cuts torchvision's `features` into slices: "slice2.3.weight" is "features.3.weight"."""
    return "features." + key.split(".", 1)[1]


def _register(net: str) -> None:
    @register(f"lpips-{net}")
    def published(weights: Weights, device: torch.device) -> Any:
        optional("lpips", f"lpips-{net}")
        return Lpips(net, weights.find(TRUNKS[net], f"lpips-{net}"), device)

    @register(f"lpips-{net}-random")
    def random(weights: Weights, device: torch.device) -> Any:
        optional("lpips", f"lpips-{net}-random")
        return Lpips(net, weights.find_own(f"{net}-random.pth", f"lpips-{net}-random"), device, "random")


for _net in TRUNKS:
    _register(_net)
