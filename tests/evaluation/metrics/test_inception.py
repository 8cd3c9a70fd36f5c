"""The three resize modes against the packages' own way from files to features."""

import cleanfid.features
import cleanfid.fid
import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from PIL import Image

from qdiff.evaluation.metrics import METRICS, metric
from qdiff.evaluation.metrics.inception import STATE_DICT, TORCHSCRIPT, Inception
from qdiff.evaluation.weights import Found, MissingWeightsError, Weights, sha256_of

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path, pictures):
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(pictures[:3]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / f"{index}.png")
    return str(tmp_path / "pictures")


def found(path):
    return Found(path, sha256_of(path))


def test_clean_is_clean_fids_own(tmp_path, torchscript, files, pictures):
    oracle = cleanfid.features.InceptionV3W(str(tmp_path), download=False)
    expected = cleanfid.fid.get_folder_features(files, oracle, num_workers=0, device=CPU, mode="clean", verbose=False)
    features = Inception(found(torchscript), CPU, "clean", "2048", "random").extract(pictures[:3])
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-6)  # another order of float32 sums


@pytest.mark.filterwarnings("ignore")  # of clean-fid's use of torchvision
def test_legacy_pytorch_is_clean_fids_own(tmp_path, files, pictures, weights, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / STATE_DICT.name).symlink_to(weights.folder / "inception-random.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    oracle = cleanfid.features.build_feature_extractor("legacy_pytorch", CPU, use_dataparallel=False)
    expected = cleanfid.fid.get_folder_features(
        files, oracle, num_workers=0, device=CPU, mode="legacy_pytorch", verbose=False
    )
    place = found(weights.folder / "inception-random.pth")
    features = Inception(place, CPU, "legacy_pytorch", "2048", "random").extract(pictures[:3])
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-6)


def test_legacy_tensorflow_is_torch_fidelitys_own(pictures, weights):
    path = weights.folder / "inception-random.pth"
    oracle = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(path))
    expected = dict(zip(("2048", "logits_unbiased"), oracle(pictures[:2]), strict=True))
    for layer, values in expected.items():
        extractor = Inception(found(path), CPU, "legacy_tensorflow", layer, "random")
        torch.testing.assert_close(extractor.extract(pictures[:2]), values, rtol=1e-5, atol=1e-6)
        assert extractor.width == values.shape[1]


def test_only_published_weights_have_the_standard_names(weights):
    names = {metric(name, weights).name for name in METRICS if name.endswith("-random") and "lpips" not in name}
    assert names == {"fd-inception-random", "kd-inception-random", "inception-score-random"}
    published = Found(weights.folder, "0" * 64)
    modes = {mode: Inception(published, CPU, mode) for mode in ("clean", "legacy_pytorch", "legacy_tensorflow")}
    assert [extractor.metric_name("fd", "fid") for extractor in modes.values()] == [
        "fid",
        "fid-legacy-pytorch",
        "fid-legacy-tensorflow",
    ]
    assert len({extractor.key for extractor in modes.values()}) == 3


@pytest.mark.parametrize(
    ("name", "file"),
    [("fid", TORCHSCRIPT), ("kid", TORCHSCRIPT), ("fid-legacy-pytorch", STATE_DICT), ("inception-score", STATE_DICT)],
)
def test_missing_weights_are_named(name, file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingWeightsError, match=f"{name} needs {file.name}.*{file.url}.*{file.sha256}"):
        metric(name, Weights(tmp_path, offline=True))
