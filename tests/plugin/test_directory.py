"""A directory is replaced whole or not at all, whichever file or rename fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qdiff.plugin import directory
from qdiff.plugin.directory import fingerprints, interrupted, verify, written_aside


def _fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text(text * 2)


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_new_and_replaced(tmp_path):
    target = tmp_path / "deep" / "target"
    for text in ("one", "two"):
        with written_aside(target) as aside:
            _fill(aside, text)
        assert _snapshot(target) == {"a.txt": text.encode(), "sub/b.txt": text.encode() * 2}
        assert [p.name for p in target.parent.iterdir()] == ["target"], "nothing is left beside it"


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_failure_at_any_sync_or_rename_changes_nothing(tmp_path, monkeypatch, exists, function):
    target = tmp_path / "target"
    if exists:
        target.mkdir()
        _fill(target, "old")
    before = _snapshot(tmp_path)
    original = {"fsync": os.fsync, "rename": Path.rename}[function]
    failures = 0
    for fatal in range(100):
        calls = 0

        def failing(*args, fatal=fatal):
            nonlocal calls
            calls += 1
            if calls - 1 == fatal:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args)

        monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}[function], failing)
        try:
            with written_aside(target) as aside:
                _fill(aside, "new")
        except OSError:
            failures += 1
            monkeypatch.undo()
            assert _snapshot(tmp_path) == before
            assert [p.name for p in tmp_path.iterdir()] == (["target"] if exists else [])
        else:
            break
        finally:
            monkeypatch.undo()
    assert failures == {"fsync": 4, "rename": 1 + exists}[function], "every call was made to fail once"
    assert _snapshot(target)["a.txt"] == b"new"


def test_a_block_that_raises_changes_nothing(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    _fill(target, "old")

    def interrupted_by_the_user():
        with written_aside(target) as aside:
            (aside / "a.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_by_the_user()
    assert _snapshot(tmp_path) == {"target/a.txt": b"old", "target/sub/b.txt": b"oldold"}


def test_interrupted_finds_what_a_crash_left(tmp_path):
    (tmp_path / ".target.0a1b.old").mkdir()
    assert interrupted(tmp_path / "target") == [tmp_path / ".target.0a1b.old"]
    assert interrupted(tmp_path / "other") == []


def test_verify_names_what_is_wrong(tmp_path):
    _fill(tmp_path, "text")
    good = fingerprints(tmp_path)
    assert good["sub/b.txt"]["bytes"] == 8
    verify(tmp_path, good)
    path = tmp_path / "sub" / "b.txt"
    path.write_text("texttexT")
    with pytest.raises(ValueError, match=r"damaged: the sha256 of sub/b\.txt"):
        verify(tmp_path, good)
    path.write_text("textte")
    with pytest.raises(ValueError, match=r"truncated: sub/b\.txt has 6 bytes, expected 8"):
        verify(tmp_path, good)
    path.unlink()
    with pytest.raises(ValueError, match=r"incomplete: sub/b\.txt is missing"):
        verify(tmp_path, good)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_verify_stays_inside(tmp_path, name):
    with pytest.raises(ValueError, match="outside of it"):
        verify(tmp_path, {name: {"bytes": 0, "sha256": ""}})


def test_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_text("abc")  # the first example of FIPS 180-2
    assert directory.fingerprints(tmp_path)["abc"]["sha256"].startswith("ba7816bf8f01cfea414140de5dae2223")
