import dataclasses

import pytest
from board import rows
from board.peers import all_peers
from board.rows import SECTIONS, Row, all_rows

from qdiff.methods.registry import REGISTRY
from qdiff.plugin.structure import resolve
from qdiff.recipe import PRESETS, LayerPlan, Recipe


def test_every_preset_is_a_row_and_every_row_is_in_a_section_of_the_script():
    found = all_rows()
    assert set(PRESETS) <= {row.label for row in found}
    assert {row.section for row in found} == set(SECTIONS)


def test_labels_are_unique_with_the_peers_and_baselines_are_labels():
    everything = [*all_rows(), *all_peers()]
    labels = [row.label for row in everything]
    assert len(set(labels)) == len(labels)
    assert {row.baseline for row in everything} <= {None, *labels}


def test_a_row_differs_from_its_baseline():
    by_label = {row.label: row for row in all_rows()}
    for row in by_label.values():
        if row.baseline in by_label:
            other = by_label[row.baseline]
            assert (row.recipe, row.calibration) != (other.recipe, other.calibration), row.label


@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.label)
def test_every_recipe_resolves_for_both_kinds_of_denoiser_and_survives_json(row, tiny_sd, tiny_dit):
    """On denoisers so narrow that groups of 32 do not divide all of their layers: those are kept."""
    assert Recipe.from_json(row.recipe.to_json()) == row.recipe
    for denoiser in (tiny_sd().unet, tiny_dit().transformer):
        assert any(isinstance(plan, LayerPlan) for plan in resolve(row.recipe, denoiser).values())


def test_every_method_has_a_row():
    def named(recipe):
        layers = (recipe, *recipe.overrides)
        specs = [spec for layer in layers for spec in (*(layer.transforms or ()), layer.rounding) if spec is not None]
        more = (recipe.linear_range, recipe.conv_range, recipe.probabilities)
        return {spec.name for spec in (*specs, *more) if spec is not None}

    assert set(REGISTRY) <= set().union(*(named(row.recipe) for row in all_rows()))


def test_a_doubled_label_and_an_unknown_baseline_are_refused(monkeypatch):
    row = Row("presets", "one", Recipe("one"))
    monkeypatch.setattr(rows, "presets", lambda: [row, row])
    with pytest.raises(ValueError, match="labels must be unique"):
        all_rows()
    monkeypatch.setattr(rows, "presets", lambda: [dataclasses.replace(row, baseline="none such")])
    with pytest.raises(ValueError, match=r"baselines must be labels of rows: got \['none such'\]"):
        all_rows()
