"""Pictures, and random networks in the place of published weights: both sides of a comparison see through the same."""

import pytest
import torch

from qdiff.evaluation.metrics.inception import TORCHSCRIPT
from qdiff.evaluation.weights import Weights


def draw(count, side=64, seed=0, contrast=70):
    """Smooth random 8-bit pictures [count, 3, side, side]."""
    coarse = torch.randn(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (smooth * contrast + 120).clamp(0, 255).to(torch.uint8)


def disturb(pictures, amount=12, seed=1):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return (pictures + amount * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="session")
def pictures():
    return draw(20)


@pytest.fixture(scope="session")
def disturbed(pictures):
    return disturb(pictures)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with a random Inception of the published one's shape, and downloads off."""
    from torchvision.models import inception_v3

    folder = tmp_path_factory.mktemp("weights")
    network = inception_v3(weights=None, init_weights=False, num_classes=1008, aux_logits=False)
    randomize(network)
    network.fc.weight.data.mul_(30)  # pictures of different classes
    torch.save(network.state_dict(), folder / "inception-random.pth")
    return Weights(folder, offline=True)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 2048, 31, stride=23)

    def forward(self, x):
        return self.convolution(x).relu().mean((2, 3))


class Detector(torch.nn.Module):
    """The interface of StyleGAN2-ADA's TorchScript Inception: `layers` on pictures in [-1, 1), and 2,048 features."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = False):
        return self.layers((x - 128) / 128)


@pytest.fixture
def torchscript(tmp_path):
    """A file of the published TorchScript's name and format, in `tmp_path`, of a network that has none of its size."""
    torch.manual_seed(0)
    path = tmp_path / TORCHSCRIPT.name
    torch.jit.script(Detector().eval()).save(str(path))
    return path


def randomize(network, seed=0):
    """He-normal weights: features keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)


class Dataset(torch.utils.data.Dataset):
    """Pictures as torch-fidelity takes them."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index]


@pytest.fixture(scope="session")
def fidelity(weights):
    """What torch-fidelity itself says of pictures (and others), through the random Inception."""
    settings = {
        "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(weights.folder / "inception-random.pth"),
        "feature_layer_fid": "64",
        "feature_layer_kid": "64",
    }
    settings |= {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}

    def calculate(pictures, others=None, **wanted):
        from torch_fidelity import calculate_metrics

        second = {} if others is None else {"input2": Dataset(others)}
        return calculate_metrics(input1=Dataset(pictures), **second, **settings, **wanted)

    return calculate
