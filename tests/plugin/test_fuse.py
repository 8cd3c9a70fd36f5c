"""What others find in a denoiser by the classes of its blocks."""

from __future__ import annotations

import pickle

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from qdiff.plugin.fuse import _FUSED, fuse_blocks


@pytest.mark.parametrize(("theirs", "ours"), _FUSED.items(), ids=lambda cls: cls.__qualname__)
def test_classes_go_by_the_name_of_what_they_stand_for(theirs, ours):
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    assert pickle.loads(pickle.dumps(ours)) is ours


def test_blocks_that_repeat_are_compiled_by_themselves(tiny_sd):
    unet = tiny_sd().unet
    fuse_blocks(unet)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 64)
    with torch.no_grad():
        expected = unet(sample, 1, text).sample
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
        blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
        assert all(block._compiled_call_impl is not None for block in blocks)
        torch.testing.assert_close(unet(sample, 1, text).sample, expected)
