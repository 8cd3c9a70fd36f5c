import sys
import types

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from qdiff.evaluation.metrics import metric
from qdiff.evaluation.metrics.clip_score import MODELS
from qdiff.evaluation.metrics.pick_score import MODEL, PROCESSOR
from qdiff.evaluation.weights import Found, MissingWeightsError, Weights

TEXTS = ["a cat, noto style", "a red house", "an apple", "a green cat in a red house"]


@pytest.fixture(scope="module")
def clip():
    """A random CLIP of two small layers, and the tokenizer of the emoji pipeline."""
    text = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        max_position_embeddings=20,
        num_attention_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)  # pictures and texts of different directions
    tokenizer = CLIPTokenizer.from_pretrained("assets/emoji-sd/tokenizer")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(images, tokenizer)


@pytest.fixture
def folder(tmp_path, clip):
    for repository in (MODELS[""], MODEL):
        clip[0].save_pretrained(tmp_path / repository.id)
    for repository in (MODELS[""], PROCESSOR):
        clip[1].tokenizer.save_pretrained(tmp_path / repository.id)
        clip[1].image_processor.save_pretrained(tmp_path / repository.id)
    return Weights(tmp_path, offline=True)


def cosines(clip, pictures):
    """By the model's own forward pass."""
    model, processor = clip
    inputs = processor(images=list(pictures), text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    return torch.nn.functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds)


def test_clip_score_is_a_hundred_times_the_cosine(clip, folder, pictures):
    score = metric("clip-score", folder)
    rows = score.rows(pictures[:4], prompts=TEXTS)
    expected = 100 * cosines(clip, pictures[:4]).clamp(min=0)
    torch.testing.assert_close(rows[:, 0], expected, rtol=1e-4, atol=1e-3)
    assert expected.max() > 1
    assert score.provenance()["backbone"] == "openai/clip-vit-large-patch14"
    assert len(score.provenance()["weights_sha256"]) == 64


def test_pick_score_is_the_scaled_cosine_of_its_model_card(clip, folder, pictures):
    rows = metric("pick-score", folder).rows(pictures[:4], prompts=TEXTS)
    expected = clip[0].logit_scale.exp().detach() * cosines(clip, pictures[:4])
    torch.testing.assert_close(rows[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_image_reward_is_its_packages(tmp_path, pictures, monkeypatch):
    calls = []

    def load(name, device, med_config):
        calls.append((name, device, med_config))
        return types.SimpleNamespace(score=lambda text, image: len(text) + image.size[0])

    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=load))
    folder = tmp_path / "THUDM" / "ImageReward"
    folder.mkdir(parents=True)
    for name in ("ImageReward.pt", "med_config.json"):
        (folder / name).write_text(name)
    with pytest.raises(MissingWeightsError, match="reads the tokenizer bert-base-uncased from the Hugging Face cache"):
        metric("image-reward", Weights(tmp_path, offline=True))
    monkeypatch.setattr("qdiff.evaluation.weights._in_hub_cache", lambda repository: Found(tmp_path, "0" * 64))
    rows = metric("image-reward", Weights(tmp_path, offline=True)).rows(pictures[:2], prompts=["a", "abc"])
    assert rows.tolist() == [[65.0], [67.0]]
    assert calls == [(str(folder / "ImageReward.pt"), "cpu", str(folder / "med_config.json"))]


def test_each_picture_needs_its_text(folder, pictures):
    with pytest.raises(ValueError, match="clip-score needs a text for each picture: got 1 for 2 pictures"):
        metric("clip-score", folder).rows(pictures[:2], prompts=["one"])
    with pytest.raises(ValueError, match="got none for 2 pictures"):
        metric("clip-score", folder).rows(pictures[:2])


@pytest.mark.parametrize("name", ["clip-score", "pick-score", "fd-dinov2"])
def test_missing_models_are_named(name, tmp_path):
    with pytest.raises(
        MissingWeightsError, match=rf"{name} needs the model .*https://huggingface.co/.* into {tmp_path}"
    ):
        metric(name, Weights(tmp_path, offline=True))


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(ImportError, match=r"image-reward needs ImageReward .*pip install image-reward"):
        metric("image-reward", Weights(tmp_path, offline=True))
