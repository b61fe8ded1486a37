"""The page of a training run, of any task."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from tests.parts.report.synthetic import EVIL, learned, manifest

from nybble.core.errors import FileError
from nybble.report.checks import check_manifest, check_training
from nybble.report.training import render_training

CLASSES: dict[str, Any] = {
    "method": "bit",
    "model": EVIL,
    "task": {"name": "classification", "unit": "records", "shown": "accuracy"},
    "steps": 40,
    "stages": [10, 30],
    "trainable": 12345,
    "data": {"examples": 70, "targets": 71},
    "curve": [[step, 2.0 - step / 40] for step in range(1, 41)],
    "losses": {"task": [1.0] * 40, EVIL: [1.0 - step / 40 for step in range(1, 41)]},
    "memory": {"weights": 5, "learned": 1},
    "evaluation": {
        "models": {
            "float": {"loss": 0.5, "accuracy": 0.875},
            "before": {"loss": 3.0, "accuracy": 0.25},
            "after": {"loss": 0.625, "accuracy": 0.75},
        },
        "samples": [{"prompt": EVIL, "before": "no", "after": EVIL, "target": "yes"}],
    },
    "versions": {"nybble": "1"},
}


def test_metrics_of_a_task_stages_and_parts_of_the_loss() -> None:
    check_training(CLASSES, "x")
    page = render_training(CLASSES)
    assert "71 records" in page and "0.2500 before, 0.8750 in float" in page
    row = re.search(r"<tr><th[^>]*>Accuracy.*?</tr>", page)
    assert row is not None and re.findall(r"<td[^>]*>([^<]+)</td>", row[0]) == [
        "0.8750", "0.2500", "0.7500", "+0.500 (+200.00 %)",
    ]  # fmt: skip
    assert page.count('<path class="border" d="M40.0 0V32"/>') == page.count('border"') == 3
    assert "(10, 30 updates)" in page
    assert page.count("<figcaption>") == 2 and "0.9750 at first" in page
    assert "alert" in page and "<script" not in page and "<img" not in page
    assert "What was learned" not in page and "<a " not in page


def test_layers_that_learned_are_drawn() -> None:
    rows = manifest(1)["layers"]
    rows[3]["learned"] = {**learned(0), "codes": 0.125, "scales": [0.5, 1.0, 2.0], "input_scales": [1.5, 1.5, 1.5]}
    rows[3]["weight_picture"]["thresholds"] = [[-0.5, -0.25], [0.25, 0.25]]
    check_manifest({"recipe": {}, "layers": rows}, "x")
    page = render_training(CLASSES, rows[3:4], "layers.html")
    assert "12.5 %" in page and "0.500, 1.000, 2.000" in page and "1.500, 1.500, 1.500" in page
    assert "levels, 2 thresholds" in page and page.count('class="histogram"') == 1 and 'href="layers.html"' in page
    rows[3]["weight_picture"]["thresholds"] = [[1.0]]
    with pytest.raises(FileError, match="weight_picture"):
        check_manifest({"recipe": {}, "layers": rows}, "x")


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        ("task", {"name": "x", "unit": "records", "shown": "nll"}, "no losses before and after"),
        ("task", "language", "task = "),
        ("stages", [], "stages = "),
        ("stages", [0], "stages = "),
        ("losses", {"task": [1.0]}, "'losses' are not those"),
        ("losses", {"task": ["1"] * 40}, "losses = "),
        ("curve", [[1, float("nan")]], "curve = "),
    ],
)
def test_a_damaged_record_is_named(place: str, value: Any, match: str) -> None:
    wrong = {**copy.deepcopy(CLASSES), place: value}
    with pytest.raises(FileError, match=f"x: .*{match}.*nybble train"):
        check_training(wrong, "x")
