import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize
from transformers import Dinov2Config, Dinov2Model

from qdiff.evaluation.metrics import metric
from qdiff.evaluation.metrics.dinov2 import MODEL
from qdiff.evaluation.weights import Weights


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path / MODEL.id)
    return network, Weights(tmp_path, offline=True)


def test_features_are_the_class_token_of_imagenets_normalization(model, pictures):
    network, weights = model
    distance = metric("fd-dinov2", weights)
    channels = [
        [
            np.asarray(Image.fromarray(channel.numpy().astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC))
            for channel in picture
        ]
        for picture in pictures[:3]
    ]
    resized = torch.from_numpy(np.array(channels)).clamp(0, 255) / 255
    with torch.no_grad():
        tokens = network(normalize(resized, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).last_hidden_state
    torch.testing.assert_close(distance.rows(pictures[:3]), tokens[:, 0], rtol=1e-4, atol=1e-4)
    assert distance.features.width == 16
    assert distance.name == "fd-dinov2"
    assert distance.provenance()["backbone"] == "facebook/dinov2-large"


def test_the_three_metrics_share_rows(model):
    names = ("fd-dinov2", "kd-dinov2", "precision-recall-dinov2")
    assert len({metric(name, model[1]).feature_key for name in names}) == 1
