"""The published files: named and addressed as the packages do it, and loaded from files of their formats.

There is no network here: the values are random, everything else is as published.
"""

import dataclasses

import cleanfid.downloads_helper
import cleanfid.features
import cleanfid.inception_pytorch
import cleanfid.resize
import lpips
import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
import torchvision
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from qdiff.evaluation.metrics import inception, metric, perceptual
from qdiff.evaluation.metrics.inception import STATE_DICT, TORCHSCRIPT
from qdiff.evaluation.metrics.perceptual import TRUNKS
from qdiff.evaluation.weights import Weights, sha256_of


def test_addresses_and_names_are_those_of_the_packages():
    assert cleanfid.downloads_helper.inception_url == TORCHSCRIPT.url
    assert STATE_DICT.url == cleanfid.inception_pytorch.FID_WEIGHTS_URL
    assert fidelity.URL_INCEPTION_V3.rsplit("/", 1)[1] in STATE_DICT.aliases
    published = {"alex": AlexNet_Weights, "vgg": VGG16_Weights, "squeeze": SqueezeNet1_1_Weights}
    assert {net: kind.IMAGENET1K_V1.url for net, kind in published.items()} == {
        net: file.url for net, file in TRUNKS.items()
    }
    for file in (TORCHSCRIPT, STATE_DICT, *TRUNKS.values()):
        assert file.url.endswith("/" + file.name)
        assert len(file.sha256) == 64
    # These packages put the first digits of the hash into the name, and check them.
    for file in (STATE_DICT, *TRUNKS.values()):
        for name in (file.name, *file.aliases):
            assert name.endswith(f"-{file.sha256[:8]}.pth")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Takes a file in a module's table for published, with the hash that it happens to have; returns its `Weights`."""

    def take(module, name, path, key=None):
        table = getattr(module, name)
        file = table if key is None else table[key]
        taken = dataclasses.replace(file, sha256=sha256_of(path))
        monkeypatch.setattr(module, name, taken if key is None else {**table, key: taken})
        return Weights(tmp_path, offline=True)

    return take


def test_fid_and_kid_load_the_torchscript(tmp_path, torchscript, pictures, published):
    weights = published(inception, "TORCHSCRIPT", torchscript)
    measured = metric("fid", weights)
    assert (measured.name, metric("kid", weights).name) == ("fid", "kid")
    measured.prepare()
    expected = cleanfid.features.InceptionV3W(str(tmp_path), download=False)
    resize = cleanfid.resize.build_resizer("clean")
    resized = np.stack([resize(picture.permute(1, 2, 0).numpy()) for picture in pictures[:2]])
    torch.testing.assert_close(
        measured.rows(pictures[:2]), expected(torch.from_numpy(resized).permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-6
    )
    assert measured.provenance()["weights_sha256"] == sha256_of(torchscript)


@pytest.mark.parametrize("name", [STATE_DICT.name, *STATE_DICT.aliases], ids=["pytorch-fid", "torch-fidelity"])
def test_the_state_dict_is_loaded_under_both_of_its_names(tmp_path, pictures, weights, published, name):
    (tmp_path / name).symlink_to(weights.folder / "inception-random.pth")
    found = published(inception, "STATE_DICT", tmp_path / name)
    legacy, score = metric("fid-legacy-tensorflow", found), metric("inception-score", found)
    legacy.prepare()
    score.prepare()
    assert legacy.rows(pictures[:1]).shape == (1, 2048)
    oracle = fidelity.FeatureExtractorInceptionV3("x", ["logits_unbiased"], str(tmp_path / name))
    torch.testing.assert_close(score.rows(pictures[:1]), oracle(pictures[:1])[0], rtol=1e-5, atol=1e-6)
    assert {legacy.name, score.name} == {"fid-legacy-tensorflow", "inception-score"}


@pytest.mark.filterwarnings("ignore")  # of clean-fid's use of torchvision
def test_the_state_dict_is_loaded_by_clean_fid(tmp_path, pictures, weights, published):
    (tmp_path / STATE_DICT.name).symlink_to(weights.folder / "inception-random.pth")
    measured = metric("fid-legacy-pytorch", published(inception, "STATE_DICT", tmp_path / STATE_DICT.name))
    measured.prepare()
    assert measured.rows(pictures[:1]).shape == (1, 2048)
    assert measured.name == "fid-legacy-pytorch"


@pytest.mark.filterwarnings("ignore")  # of lpips' use of torchvision
def test_lpips_loads_torchvisions_whole_state_dict(tmp_path, pictures, disturbed, published, monkeypatch):
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None)  # with its classifier, as it is published
    path = tmp_path / TRUNKS["squeeze"].name
    torch.save(network.state_dict(), path)
    measured = metric("lpips-squeeze", published(perceptual, "TRUNKS", path, "squeeze"))
    measured.prepare()
    monkeypatch.setattr(torchvision.models, "squeezenet1_1", lambda pretrained: network)
    oracle = lpips.LPIPS(net="squeeze", verbose=False)
    expected = [
        oracle(*(lpips.im2tensor(picture.permute(1, 2, 0).numpy()) for picture in pair)).item()
        for pair in zip(disturbed[:2], pictures[:2])
    ]
    assert measured.rows(disturbed[:2], pictures[:2])[:, 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert measured.name == "lpips-squeeze"
