import tempfile
from pathlib import Path

import numpy as np
import pytest

from qdiff.evaluation.rows import RowWriter, read_rows


def write(folder, keys, rows, process=0):
    with RowWriter(folder, process) as writer:
        writer.append(keys, np.asarray(rows, dtype=np.float32))


@pytest.fixture
def scratch():
    with tempfile.TemporaryFile() as file:
        yield file


def test_rows_come_back_in_the_order_asked_for(tmp_path, scratch):
    write(tmp_path / "rows", ["a", "b"], [[1, 2], [3, 4]], process=1)
    write(tmp_path / "rows", ["c"], [[5, 6]])
    found = read_rows(tmp_path / "rows")
    assert found.ordered(["c", "a", "b"], scratch).tolist() == [[5, 6], [1, 2], [3, 4]]


def test_a_key_counts_once_whoever_wrote_it(tmp_path):
    write(tmp_path, ["a", "b"], [[1], [2]])
    write(tmp_path, ["a"], [[1]], process=3)
    assert sorted(read_rows(tmp_path).places) == ["a", "b"]


@pytest.mark.parametrize("cut", ["rows", "keys"])
def test_what_a_kill_cut_short_does_not_count(tmp_path, scratch, cut):
    write(tmp_path, ["first", "second"], [[1, 2], [3, 4]])
    path = next(tmp_path.glob(f"*.{cut}"))
    path.write_bytes(path.read_bytes()[:-3])
    found = read_rows(tmp_path)
    assert list(found.places) == ["first"]
    write(tmp_path, ["second"], [[3, 4]])
    again = read_rows(tmp_path)
    assert again.ordered(["first", "second"], scratch).tolist() == [[1, 2], [3, 4]]


def test_rows_of_different_widths_are_refused(tmp_path):
    write(tmp_path, ["a"], [[1]])
    write(tmp_path, ["b"], [[1, 2]], process=1)
    with pytest.raises(ValueError, match="rows of 1 and of 2"):
        read_rows(tmp_path)
    with RowWriter(tmp_path / "other") as writer, pytest.raises(ValueError, match="rows must be"):
        writer.append(["a", "b"], np.zeros((1, 3), np.float32))


def test_nothing_is_there_at_first(tmp_path):
    assert read_rows(tmp_path / "none").places == {}


def test_no_room_for_the_rows_in_their_order_is_told(tmp_path):
    write(tmp_path, ["a"], [[1, 2]])
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as full:
        read_rows(tmp_path).ordered(["a"], full)


def test_rows_in_their_order_may_be_changed_and_may_be_none(tmp_path, scratch):
    write(tmp_path, ["a"], [[1, 2]])
    rows = read_rows(tmp_path).ordered(["a"], scratch)
    rows += 1
    assert read_rows(tmp_path).ordered([], scratch).shape == (0, 2)
    scratch.seek(0)
    assert np.frombuffer(scratch.read(), np.float32).tolist() == [1, 2]


def test_a_full_disk_is_told(tmp_path):
    writer = RowWriter(tmp_path)
    writer.append(["a"], np.zeros((1, 1), np.float32))
    writer._files[0].close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer._files = (full, writer._files[1])
        with pytest.raises(OSError, match=r"No space left.*free some space"):
            writer.append(["b"], np.zeros((1, 1), np.float32))
