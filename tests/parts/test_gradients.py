"""Steps that a GPU replays: which batches may be replayed as another; and, where there is a GPU, the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model

import nybble
from nybble.calibration.trace import BlockCall
from nybble.nn.kinds import quant_modules
from nybble.reconstruction import gradients
from nybble.reconstruction.gradients import same_call

MASK, TABLE = torch.ones(2, 3, dtype=torch.bool), torch.rand(3, 4)
CALL = BlockCall(index=1, args=(None, 2), kwargs={"places": (TABLE, [TABLE])}, keyword=None, start=None, mask=MASK)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True), ({"args": (None, 2)}, True), ({"kwargs": {"places": (TABLE, [TABLE])}}, True),
        ({"args": (None, 3)}, False), ({"args": (None, 2.0)}, False), ({"args": (None,)}, False),
        ({"kwargs": {"places": (TABLE, [TABLE.clone()])}}, False), ({"kwargs": {}}, False),
        ({"mask": MASK.clone()}, False), ({"mask": None}, False), ({"keyword": "x"}, False), ({"index": 2}, False),
        ({"args": (None, object())}, False),
    ],
)  # fmt: skip
def test_calls_are_the_same_if_they_pass_the_same_objects(changes: dict[str, Any], same: bool) -> None:
    """A replay reads the tensors that were there when it was recorded, whatever a later batch's are."""
    assert same_call(CALL, replace(CALL, **changes)) is same


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", ["clip", "adaround", "flexround", "sign-round", "lora-rounding"])
def test_replayed_steps_come_to_the_same_codes(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "scheme": {"weights": "int3 group=16 symmetric=false"},
        "steps": [{"solver": "rtn"}, {"reconstruction": "mse", "weights": part, "steps": 40}],
    }
    data = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(2))
    replayed, found = 0, []
    replay = gradients._Recorded.replay

    def counted(*args: Any) -> Any:
        nonlocal replayed
        replayed += 1
        return replay(*args)

    monkeypatch.setattr(gradients._Recorded, "replay", counted)
    for fewest in (10, 1 << 30):
        monkeypatch.setattr(gradients, "FEWEST", fewest)
        model, report = nybble.quantize(tiny_model().float().cuda(), recipe, data, settings={"batch": 4})
        found.append([t.cpu() for _, module in quant_modules(model) for t in module.state_dict().values()])
        found.append([row.notes for row in report.layers])
    assert replayed > 20  # the full batches; the last one is smaller
    assert found[1] == found[3] and all(map(torch.equal, found[0], found[2]))
