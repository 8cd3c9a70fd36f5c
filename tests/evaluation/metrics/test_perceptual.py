import lpips
import pytest
import torch
import torchvision

from qdiff.evaluation.metrics import metric
from qdiff.evaluation.metrics.perceptual import TRUNKS
from qdiff.evaluation.weights import MissingWeightsError, Weights

NETWORKS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def random_network(net, seed=0):
    """torchvision's network with random features; the hundred million weights of its classifier are never made."""
    with torch.device("meta"):
        network = getattr(torchvision.models, NETWORKS[net])(weights=None)
    network.features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.features.parameters():
        parameter.data.normal_(0, (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1, generator=generator)
    return network


def save_trunk(net, folder):
    trunk = random_network(net).features.state_dict(prefix="features.")
    torch.save(trunk, folder / f"{net}-random.pth")


@pytest.mark.parametrize("net", NETWORKS)
def test_lpips_is_that_of_the_package(net, tmp_path, pictures, disturbed, monkeypatch):
    save_trunk(net, tmp_path)
    original, other = random_network(net), random_network(net, seed=1)
    monkeypatch.setattr(torchvision.models, NETWORKS[net], lambda pretrained: original if pretrained else other)
    oracle = lpips.LPIPS(net=net, verbose=False)  # takes `original` for the pretrained network

    measured = metric(f"lpips-{net}-random", Weights(tmp_path, offline=True))
    rows = measured.rows(disturbed[:6], pictures[:6])
    expected = [
        oracle(*(lpips.im2tensor(picture.permute(1, 2, 0).numpy()) for picture in pair)).item()
        for pair in zip(disturbed[:6], pictures[:6])
    ]
    assert min(expected) > 0
    # The same operations on a batch of six and on each alone: float32 rounding.
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-4)


def test_another_trunk_has_another_name(tmp_path):
    save_trunk("squeeze", tmp_path)
    measured = metric("lpips-squeeze-random", Weights(tmp_path, offline=True))
    assert (measured.name, measured.record_name) == ("lpips-squeeze-random", "lpips_squeeze_random")
    assert len(measured.provenance()["weights_sha256"]) == 64
    assert measured.provenance()["linear_sha256"].startswith("4a5350f2")


@pytest.mark.parametrize("net", NETWORKS)
def test_missing_weights_are_named_with_their_address(net, tmp_path):
    file = TRUNKS[net]
    message = rf"lpips-{net} needs {file.name}.*download {file.url} .*{file.sha256}\) and put it into {tmp_path}"
    with pytest.raises(MissingWeightsError, match=message):
        metric(f"lpips-{net}", Weights(tmp_path, offline=True))


def test_other_contents_under_a_published_name_are_refused(tmp_path):
    (tmp_path / TRUNKS["alex"].name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not the published alexnet-owt-7be5be79.pth"):
        metric("lpips-alex", Weights(tmp_path, offline=True))
