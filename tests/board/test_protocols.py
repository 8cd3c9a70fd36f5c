"""The scripts around `evaluate`: protocols as data, and the table of the assets' evaluation."""

from types import SimpleNamespace

import evaluate_assets
import pytest
import reproduce_protocol
from protocols import LABELS, PROTOCOLS, Protocol
from reproduce_protocol import items_of, needs

from qdiff.evaluation import Record, Report
from qdiff.evaluation.metrics import METRICS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_ask_for_metrics_that_exist_and_say_what_they_need(name):
    protocol = PROTOCOLS[name]
    assert set(protocol.metrics) <= set(METRICS)
    text = "\n".join(needs(name, protocol))
    assert f"{protocol.pictures:,} {protocol.subject}" in text
    assert ("; real pictures" in text) == protocol.real
    assert f"{protocol.pictures * protocol.steps * protocol.passes:,} rows" in text
    assert protocol.source in text
    assert protocol.open in text


def test_class_labels_come_equally_often_and_captions_from_their_file(tmp_path):
    labels = items_of(PROTOCOLS["imagenet-50k"], None)
    counts = [0] * 1000
    for item in labels:
        counts[item.prompt] += 1
    assert set(counts) == {50}
    few = Protocol(2, "captions", "any", 1, 1.0, 1, 64, ("psnr",), False, "a test", "nothing")
    (tmp_path / "captions.txt").write_text("a\nb\nc\n")
    assert [item.prompt for item in items_of(few, tmp_path / "captions.txt")] == ["a", "b"]
    with pytest.raises(SystemExit, match="needs 10,000"):
        items_of(PROTOCOLS["coco-10k"], tmp_path / "captions.txt")
    with pytest.raises(SystemExit, match="--captions"):
        items_of(PROTOCOLS["coco-10k"], None)


def test_an_estimate_is_of_all_pipelines(tiny_dit, tmp_path, capsys):
    tiny_dit().save_pretrained(tmp_path / "pipe")
    protocol = Protocol(100, LABELS, "any", 2, 2.0, 2, 16, ("psnr",), False, "a test", "nothing")
    folder = tmp_path / "pipe"
    items = items_of(protocol, None)
    reproduce_protocol.estimate(protocol, items, folder, {"it": folder}, SimpleNamespace(batch=2))
    out = capsys.readouterr().out
    assert out.count("s a picture on cpu") == 2
    assert "all pipelines" in out


def test_the_table_has_a_row_a_candidate_and_no_empty_columns():
    records = (
        Record.exact("stored_bytes", 100, candidate="reference"),
        Record.exact("stored_bytes", 32, candidate="w4a8"),
        Record("psnr_db", 27.5, 27.1, 27.9, 8, {"candidate": "w4a8"}),
        Record("psnr_db", 20.0, 19.0, 21.0, 2, {"candidate": "w4a8", "group": "noto"}),
        Record("psnr_db_worst_group", 20.0, 19.0, 21.0, 2, {"candidate": "w4a8"}),
        Record("psnr_db_worst_group", 11.0, 10.0, 12.0, 2, {"candidate": "w4a8", "grouping": "category"}),
        Record("psnr_db", 12.0, 11.0, 13.0, 8, {"candidate": "naive"}),
        Record("fd_to_icons_efficientnet_lite0", 3.0, 2.5, 3.5, 8, {"candidate": "reference"}),
    )
    lines = evaluate_assets.table(Report("test", records), ["w4a8", "naive"]).splitlines()
    assert lines[0] == "| | bytes | PSNR, dB | worst style, dB |"
    assert lines[2] == "| w4a8 | 0.320 | 27.50 (27.10 to 27.90) | 20.00 (19.00 to 21.00) |"
    assert lines[3] == "| naive |  | 12.00 (11.00 to 13.00) |  |"
    assert lines[-1] == "Full precision is 3.00 (2.50 to 3.50) from the real icons."
