import pytest
import torch
from torch import nn

from qdiff.layers import LayerSizes, QuantEmbedding


@pytest.fixture
def build(make_plan, quantize):
    """Factory of a float table and its quantized stand-in."""

    def make(bits=4, **options):
        layer = nn.Embedding(30, 24, **options)
        plan = make_plan("embedding", (24,), bits, "none")
        return layer, QuantEmbedding.from_float(layer, plan, quantize(layer.weight, plan))

    return make


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_rows_are_those_of_the_dequantized_table(build, bits, shape):
    _, quantized = build(bits)
    ids = torch.randint(0, 30, shape)
    result = quantized(ids)
    assert result.shape == (*shape, 24)
    assert torch.equal(result, quantized.weight[ids])


@pytest.mark.parametrize(("bits", "allowed"), [(4, 0.1), (8, 0.01)])
def test_the_table_is_near_the_float_one(build, bits, allowed):
    layer, quantized = build(bits, padding_idx=3)
    assert float((quantized.weight - layer.weight).norm() / layer.weight.norm()) < allowed
    assert (quantized(torch.tensor(3)) == 0).all()  # the padding row is zeros


def test_only_the_rows_looked_up_are_unpacked(build, monkeypatch):
    _, quantized = build()
    seen = []
    rows = QuantEmbedding._rows
    monkeypatch.setattr(QuantEmbedding, "_rows", lambda self, chosen: seen.append(chosen) or rows(self, chosen))
    quantized(torch.tensor([4, 4, 7]))
    assert [chosen.tolist() for chosen in seen] == [[4, 4, 7]]


def test_the_dtype_follows_conversions(build):
    _, quantized = build()
    scale = quantized.scale.clone()
    assert quantized.half()(torch.tensor([1])).dtype == torch.float16
    assert torch.equal(quantized.scale, scale)


def test_an_empty_table_takes_the_state_strictly(build):
    layer, quantized = build()
    empty = QuantEmbedding.empty(layer.to("meta"), quantized.plan)
    empty.load_state_dict(quantized.state_dict(), strict=True, assign=True)
    assert torch.equal(empty.weight, quantized.weight)


def test_is_a_table_to_others(build):
    _, quantized = build()
    assert isinstance(quantized, nn.Embedding)
    assert (quantized.num_embeddings, quantized.embedding_dim) == (30, 24)
    assert "int4/8" in repr(quantized)


def test_ids_outside_the_table(build):
    _, quantized = build()
    with pytest.raises(IndexError):
        quantized(torch.tensor([30]))


def test_tables_that_are_not_built(make_plan):
    with pytest.raises(ValueError, match="max_norm"):
        QuantEmbedding.empty(nn.Embedding(30, 24, max_norm=1.0), make_plan("embedding", (24,), mode="none"))
    with pytest.raises(ValueError, match="range_mode"):
        QuantEmbedding.empty(nn.Embedding(30, 24), make_plan("embedding", (24,), mode="static"))
    with pytest.raises(ValueError, match="rank"):
        QuantEmbedding.empty(nn.Embedding(30, 24), make_plan("embedding", (24,), mode="none"), LayerSizes(rank=2))
