"""What training came to, by layer: against what was done to the layers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nybble.nn.fake import FakeLayer
from nybble.nn.twin import Twin
from nybble.report.trained import facts_of, start_of, trained_rows
from nybble.training.convert import convert
from nybble.training.prepare import prepare

SCHEME = {"weights": "int3 channel", "inputs": "int8 static"}
X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


def prepared() -> tuple[Any, list[FakeLayer]]:
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    model = prepare(float_model, SCHEME, {"weights": "lsq", "inputs": "lsq"}, run=lambda model: model(X))
    return model, [module for module in model.modules() if isinstance(module, FakeLayer)]


@torch.no_grad()
def test_scales_that_moved_in_place_are_told_beside_what_they_were() -> None:
    model, (first, second) = prepared()
    start = start_of(model)
    scales = {name: parameters for name, parameters in first.groups().items() if "." in name}
    scales["weights.scales"][0].mul_(2.0)
    scales["inputs.scales"][0].mul_(0.5)
    latent = second.weight.latent
    signs = latent[:2].sign()
    latent[:2] = -latent[:2]
    facts = facts_of(model, start)
    rows = {row.name: row for row in trained_rows(convert(model), facts)}
    assert [*rows] == ["0", "2"] and not any(isinstance(module, Twin) for module in model.modules())
    doubled, turned = rows["0"], rows["2"]
    assert doubled.learned is not None and turned.learned is not None
    assert doubled.learned["scales"] == pytest.approx([2, 2, 2])
    assert doubled.learned["input_scales"] == pytest.approx([0.5, 0.5, 0.5]) and doubled.learned["codes"] > 0
    packed = model[2].weight.qtensor().unpacked()
    share = float((signs * packed[:2] != 0).float().mean()) / 4  # codes of zero have no sign to turn
    assert turned.learned["scales"] == [1, 1, 1] and turned.learned["codes"] == pytest.approx(share, abs=0.02)
    assert doubled.weight_picture is not None and sum(doubled.weight_picture["counts"]) == 16 * 8
    assert doubled.weights is not None and doubled.weights.startswith("int3 channel")


def test_nothing_moved_is_told_as_that() -> None:
    model, _ = prepared()
    facts = facts_of(model, start_of(model))
    assert all(
        found["learned"] == {"codes": 0, "scales": [1, 1, 1], "input_scales": [1, 1, 1]} for found in facts.values()
    )


def test_layers_that_nothing_is_known_of_keep_what_their_weights_say() -> None:
    model, _ = prepared()
    rows = trained_rows(convert(model), {})
    assert [row.learned for row in rows] == [None, None] and all(row.bits > 3 for row in rows)
