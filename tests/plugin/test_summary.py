"""The summary adds up to what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff import summary
from qdiff.plugin.structure import find_denoiser, quantization_of


def test_before_is_the_float_denoiser_at_16_bits(tiny, quantize):
    pipe = tiny()
    denoiser = find_denoiser(pipe)[1]
    expected = 2 * sum(tensor.numel() for tensor in [*denoiser.parameters(), *denoiser.buffers()])
    assert summary(pipe).bytes_before == expected
    assert summary(pipe).ratio == 1
    assert summary(quantize(pipe, recipe="naive")).bytes_before == expected


def test_after_is_everything_stored(quantized):
    """In half precision nothing needs converting, so the count is that of the tensors, taken another way."""
    pipe = quantized()
    after = summary(pipe).bytes_after
    half = pipe.to(torch.float16)
    denoiser = find_denoiser(half)[1]
    stored = sum(t.numel() * t.element_size() for t in [*denoiser.parameters(), *denoiser.buffers()])
    assert summary(half).bytes_after == summary(half).bytes_held == stored == after


def test_after_counts_the_checkpoint_file(quantized, tmp_path):
    from qdiff import save

    pipe = quantized().to(torch.float16)
    save(pipe, tmp_path / "saved")
    size = next((tmp_path / "saved").glob("*/qdiff.safetensors")).stat().st_size
    header = 200 * (len(find_denoiser(pipe)[1].state_dict()) + 2)  # safetensors: a JSON entry a tensor
    assert summary(pipe).bytes_after <= size <= summary(pipe).bytes_after + header


def test_every_layer_has_a_row_and_a_reason_if_kept(quantized):
    pipe = quantized()
    denoiser = find_denoiser(pipe)[1]
    record = quantization_of(denoiser)
    rows = {row.name: row for row in summary(pipe).rows[:-1]}
    assert rows.keys() == record.plans.keys() | record.kept.keys()
    for name, row in rows.items():
        assert row.reason == record.kept.get(name, "")
    row = next(row for name, row in rows.items() if name.endswith("attn1.to_q"))
    assert row.format == "4-bit weight, 8-bit input, dynamic"
    assert row.bytes_after < 0.4 * row.bytes_before


def test_shared_tensors_count_once(tiny_sd, quantize):
    pipe = tiny_sd()
    whole = summary(pipe).bytes_before
    first, second = pipe.unet.mid_block.resnets[:2]
    second.conv2 = first.conv2
    size = 2 * sum(p.numel() for p in first.conv2.parameters())
    assert summary(pipe).bytes_before == whole - size
    assert summary(quantize(pipe, recipe="naive")).bytes_before == whole - size


def test_print(quantized):
    text = str(summary(quantized()))
    assert "the recipe keeps" in text
    assert "ratio 0." in text
    assert max(map(len, text.splitlines())) <= 150


def test_wrong_object():
    with pytest.raises(ValueError, match="must be a diffusers pipeline"):
        summary(nn.Linear(2, 2))
