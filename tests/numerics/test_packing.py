import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.numerics.packing import (
    expand_codebook,
    expand_int4,
    expand_weight,
    pack_int4,
    pack_multipliers,
    storage_block,
    unpack_int4,
    unpack_multipliers,
)


def random_codes(rows, groups, half, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, groups * half * 2), dtype=torch.int8, generator=generator)


sizes = st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 40), st.integers(0, 9))


@given(sizes)
def test_unpacking_undoes_packing(size):
    rows, groups, half, seed = size
    q = random_codes(rows, groups, half, seed)
    packed = pack_int4(q, 2 * half)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, groups * half)
    assert torch.equal(unpack_int4(packed, 2 * half), q)


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 9))
def test_unpacking_undoes_packing_of_multipliers(rows, groups, seed):
    m = torch.randint(1, 16, (rows, groups), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_multipliers(m)
    assert packed.shape == (rows, (groups + 1) // 2)
    assert torch.equal(unpack_multipliers(packed, groups), m)


@given(sizes)
def test_expanding_multiplies_codes_by_their_groups_multiplier(size):
    rows, groups, half, seed = size
    q = random_codes(rows, groups, half, seed)
    m = torch.randint(1, 16, (rows, groups), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    expected = q.long() * m.long().repeat_interleave(2 * half, dim=1)
    assert torch.equal(expand_int4(pack_int4(q, 2 * half), pack_multipliers(m), 2 * half).long(), expected)


def test_the_extreme_products_fit():
    q = torch.tensor([[-8, 7, -8, 7]], dtype=torch.int8)
    m = torch.tensor([[15]], dtype=torch.uint8)
    assert expand_int4(pack_int4(q, 4), pack_multipliers(m), 4).tolist() == [[-120, 105, -120, 105]]


def test_the_documented_picture():
    """The nibbles by hand: checkpoints and kernels rely on them, so a round trip alone is not enough."""
    q = torch.tensor([[-8, -7, -6, -5, 4, 5, 6, 7]], dtype=torch.int8)
    assert [f"{byte:02x}" for byte in pack_int4(q, 8)[0].tolist()] == ["c0", "d1", "e2", "f3"]
    assert [f"{byte:02x}" for byte in pack_int4(q, 4)[0].tolist()] == ["20", "31", "ec", "fd"]
    m = torch.tensor([[1, 2, 3, 4, 15]], dtype=torch.uint8)
    assert [f"{byte:02x}" for byte in pack_multipliers(m)[0].tolist()] == ["21", "43", "1f"]


def test_a_view_of_rows_packs_like_its_copy():
    q = random_codes(8, 2, 4)[::2]
    assert torch.equal(pack_int4(q, 8), pack_int4(q.contiguous(), 8))
    packed = pack_int4(random_codes(8, 2, 4), 8)[::2]
    assert torch.equal(unpack_int4(packed, 8), unpack_int4(packed.contiguous(), 8))


@given(sizes)
def test_a_codebook_replaces_every_code_by_its_rows_entry(size):
    rows, groups, half, seed = size
    q = random_codes(rows, groups, half, seed)
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randint(-128, 128, (rows, 16), dtype=torch.int8, generator=generator)
    result = expand_codebook(pack_int4(q, 2 * half), codebook, 2 * half)
    assert result.dtype == torch.int8
    assert result.tolist() == [[codebook[n, u].item() for u in row] for n, row in enumerate((q + 8).tolist())]


def test_multiples_are_a_codebook_too():
    q, m = random_codes(6, 1, 16), torch.randint(1, 16, (6, 1)).to(torch.uint8)
    codebook = (torch.arange(-8, 8) * m).to(torch.int8)
    packed = pack_int4(q, 32)
    assert torch.equal(expand_weight(packed, None, codebook, 32), expand_weight(packed, pack_multipliers(m), None, 32))


@pytest.mark.parametrize(
    ("group_size", "block"), [(64, 32), (32, 32), (320, 32), (96, 32), (16, 16), (48, 16), (8, 8), (6, 2)]
)
def test_storage_block(group_size, block):
    assert storage_block(group_size) == block


@pytest.mark.parametrize("group_size", [64, 96])
def test_a_group_is_stored_as_blocks_with_the_same_multiplier(group_size):
    block, groups = storage_block(group_size), 3
    q = random_codes(4, groups, group_size // 2)
    m = torch.randint(1, 16, (4, groups)).to(torch.uint8)
    blocks = pack_multipliers(m.repeat_interleave(group_size // block, dim=1))
    expected = q.long() * m.long().repeat_interleave(group_size, dim=1)
    assert torch.equal(expand_int4(pack_int4(q, block), blocks, block).long(), expected)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pack_int4(torch.tensor([[8, 0]], dtype=torch.int8), 2), "q"),
        (lambda: pack_int4(torch.tensor([[-9, 0]], dtype=torch.int8), 2), "q"),
        (lambda: pack_int4(torch.zeros(1, 2), 2), "q"),
        (lambda: pack_int4(torch.zeros(1, 6, dtype=torch.int8), 4), "group_size"),
        (lambda: pack_int4(torch.zeros(1, 6, dtype=torch.int8), 3), "group_size"),
        (lambda: pack_multipliers(torch.zeros(1, 2, dtype=torch.uint8)), "multipliers"),
        (lambda: pack_multipliers(torch.full((1, 2), 16, dtype=torch.uint8)), "multipliers"),
    ],
    ids=["above", "below", "float", "ragged", "odd", "zero", "sixteen"],
)
def test_what_cannot_be_packed_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
