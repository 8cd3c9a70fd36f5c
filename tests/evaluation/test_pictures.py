import errno

import pytest
import torch
from PIL import Image

from qdiff.evaluation.pictures import BLACK, NAN, PictureStore, read_picture


@pytest.fixture
def pixels():
    return torch.randint(1, 256, (3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_picture_comes_back_as_it_was(tmp_path, pixels):
    store = PictureStore(tmp_path / "pictures")
    assert not store.has("a")
    store.write("a", pixels)
    assert store.has("a")
    picture = read_picture(store.path("a"))
    assert torch.equal(picture.pixels, pixels)
    assert picture.flaw is None


def test_flaws_are_remembered(tmp_path, pixels):
    store = PictureStore(tmp_path)
    store.write("black", torch.zeros_like(pixels))
    store.write("nan", pixels, finite=False)
    assert read_picture(store.path("black")).flaw == BLACK
    assert read_picture(store.path("nan")).flaw == NAN


def test_a_full_disk_leaves_nothing_under_the_name(tmp_path, pixels, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*/a\.png: No space left.*free some space"):
        PictureStore(tmp_path).write("a", pixels)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_named(tmp_path, pixels):
    PictureStore(tmp_path).write("a", pixels)
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png is no picture"):
        read_picture(path)
