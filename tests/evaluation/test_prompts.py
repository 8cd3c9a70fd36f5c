import json
from collections import Counter
from pathlib import Path

import pytest

from qdiff.evaluation.builtin_prompts import SETS, builtin_prompts
from qdiff.evaluation.prompts import Item, items_of, read_prompts

ASSETS = Path(__file__).parents[2] / "assets"


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_is_a_prompt_a_line(tmp_path):
    items = read_prompts(write(tmp_path, "p.txt", "a cat\n\n  a dog, running  \n"))
    assert items == (Item(0, "a cat", 0), Item(1, "a dog, running", 1))


def test_whole_numbers_are_class_labels(tmp_path):
    assert [item.prompt for item in read_prompts(write(tmp_path, "p.txt", "7\n0\n"))] == [7, 0]


def test_csv_and_jsonl_have_the_same_columns(tmp_path):
    csv = write(
        tmp_path,
        "p.csv",
        'prompt,seed,group,negative_prompt,reference\n"a cat, red",5,pets,blurry,real/1.png\na dog,,,,\n',
    )
    rows = [
        {"prompt": "a cat, red", "seed": 5, "group": "pets", "negative_prompt": "blurry", "reference": "real/1.png"},
        {"prompt": "a dog", "seed": None},
    ]
    jsonl = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    first = Item(0, "a cat, red", 5, "pets", "blurry", tmp_path / "real" / "1.png")
    assert read_prompts(csv) == read_prompts(jsonl) == (first, Item(1, "a dog", 1))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("p.txt", "\n \n", "has no prompt", id="empty"),
        pytest.param("p.csv", "prompt\n", "has no prompt", id="empty-csv"),
        pytest.param("p.csv", "prompt,sed\na cat,3\n", "p.csv:2: unknown columns sed", id="misspelled"),
        pytest.param("p.csv", "prompt,seed\na cat\n", "p.csv:2: got other columns", id="short-row"),
        pytest.param("p.csv", "prompt,seed\na cat,1,2\n", "p.csv:2: got other columns", id="long-row"),
        pytest.param("p.csv", 'prompt\n"a cat\n', "p.csv:2: malformed CSV", id="open-quote"),
        pytest.param("p.csv", "prompt,seed\na cat,1.5\n", "p.csv:2: seed must be", id="seed"),
        pytest.param("p.csv", "prompt,seed\n,1\n", "p.csv:2: prompt must be", id="no-prompt"),
        pytest.param("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: malformed JSON", id="json"),
        pytest.param("p.jsonl", '{"prompt": "a"}\n["b"]\n', "p.jsonl:2: expected an object", id="json-list"),
        pytest.param("p.jsonl", '{"prompt": true}\n', "p.jsonl:1: prompt must be", id="json-bool"),
        pytest.param("p.jsonl", '{"prompt": "a", "group": 3}\n', "p.jsonl:1: group must be", id="json-group"),
        pytest.param("p.jsonl", '{"prompt": "a", "seed": -1}\n', "p.jsonl:1: seed must be", id="json-seed"),
        pytest.param("p.txt", "a cat\n\n7\n", "p.txt:3: prompt is a class label", id="mixed"),
        pytest.param("p.csv", "prompt,seed\na,1\nb,1\na,1\n", "p.csv:4: draws the same picture as line 2", id="twice"),
        pytest.param("p.yaml", "a cat\n", "must be a file of .txt", id="suffix"),
    ],
)
def test_what_is_malformed_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path, name, text))
    assert message in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_items_keep_what_they_have_and_get_their_index():
    given = Item(9, "a cat", 3, "pets")
    assert items_of(["a dog", given]) == (Item(0, "a dog", 0), Item(1, "a cat", 3, "pets"))
    with pytest.raises(ValueError, match="one or more"):
        items_of([])


def test_built_in_sets_are_whole_and_grouped():
    held_out = {entry["caption"] for entry in json.loads((ASSETS / "emoji-heldout.json").read_text())}
    assert {item.prompt for item in builtin_prompts("emoji-sd-held-out", ASSETS)} == held_out
    styles = builtin_prompts("emoji-sd-styles", ASSETS)
    assert Counter(item.group for item in styles) == dict.fromkeys(("noto", "fluent", "flat", "twemoji"), 500)
    assert sum(item.prompt in held_out for item in styles) == 500
    categories = builtin_prompts("emoji-sd-categories", ASSETS)
    assert [(item.prompt, item.seed) for item in categories] == [(item.prompt, item.seed) for item in styles]
    assert {item.prompt for item in builtin_prompts("emoji-dit-classes", ASSETS)[:36]} == set(range(36))
    for name in SETS:
        items = builtin_prompts(name, ASSETS)
        assert all(item.group for item in items)
        assert len({(item.prompt, item.seed) for item in items}) == len(items)


def test_an_unknown_set_and_a_missing_folder_are_told(tmp_path):
    with pytest.raises(ValueError, match="emoji-sd-held-out"):
        builtin_prompts("emoji", ASSETS)
    with pytest.raises(FileNotFoundError, match=r"emoji-heldout\.json"):
        builtin_prompts("emoji-sd-styles", tmp_path)
