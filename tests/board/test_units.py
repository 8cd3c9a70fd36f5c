from board.peers import all_peers
from board.rows import all_rows
from board.units import Settings, Shared, Unit, next_ready, tasks_of

from qdiff.plugin.calibrate import settings_of

ROWS = {row.label: row for row in (*all_rows(), *all_peers())}


def tasks(tmp_path, labels, seeds=3):
    units = [Unit("emoji-dit", seed, ROWS[label]) for seed in range(seeds) for label in labels]
    return tasks_of(units, Settings(tmp_path, tmp_path))


def place(found, seed, label):
    return next(i for i, task in enumerate(found) if task.unit.seed == seed and task.unit.row is ROWS[label])


def test_first_the_first_seed_of_all_then_presets_and_peers_then_rounding_then_the_rest(tmp_path):
    found = tasks(tmp_path, ["smoothing", "nearest", "w4a8", "SDNQ int4"])
    order = [(0, "smoothing"), (0, "SDNQ int4"), (1, "w4a8"), (2, "SDNQ int4"), (1, "nearest"), (2, "smoothing")]
    places = [place(found, seed, label) for seed, label in order]
    assert places == sorted(places)


def test_every_preparation_is_there_once_and_before_all_that_wait_for_it(tmp_path):
    found = tasks(tmp_path, ["w4a8", "gptq", "ptq4dm", "SDNQ int4"])
    keys = [task.key for task in found]
    assert len(set(keys)) == len(keys)
    for index, task in enumerate(found):
        assert task.after <= set(keys[:index])
    # A reference a seed, and two sets of statistics: PTQ4DM's are of other steps.
    assert len(found) == 12 + 3 * 3


def test_rows_share_statistics_where_they_calibrate_alike():
    shared = {label: Shared.by(ROWS[label], 1) for label in ("w4a8", "gptq", "ptq4dm", "W8A8 min-max, first_token")}
    assert shared["w4a8"] == shared["gptq"]
    assert all(ROWS[label].recipe in shared["w4a8"].recipes for label in ("w4a8", "gptq"))
    assert shared["w4a8"].calibration.seed == 100
    for label in ("ptq4dm", "W8A8 min-max, first_token"):
        assert shared[label] != shared["w4a8"]
        for recipe in shared[label].recipes:
            assert settings_of(shared[label].calibration, None, recipe) == shared[label].calibration


def test_what_waits_lets_others_pass(tmp_path):
    found = tasks(tmp_path, ["w4a8"], seeds=1)
    unfinished = {task.key for task in found}
    row = found.pop()
    assert next_ready([row, *found], unfinished) is found[0]
    assert next_ready([row], {row.key}) is row
    assert next_ready([row], unfinished) is None
