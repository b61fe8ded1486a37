"""Callbacks of training: at work on every kind of twin, and what they leave is packed bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, tiny_model
from torch import nn

from nybble.core.errors import SchemeError, UsageError
from nybble.training.callbacks import CALLBACKS, Acting, make_part
from nybble.training.convert import convert
from nybble.training.prepare import prepare

NAMES = CALLBACKS.names()
#: Options with which a callback does all that it can within a few updates.
BUSY: dict[str, dict[str, Any]] = {
    "oscillation": {"reset_every": 2, "reset_at": 1},
    "annealing": {"start": 0.2, "range": 0.1},
    "policy": {"target": 3.5, "delay": 0.1, "lr": 0.5},
    "pruning": {"first": 0.2, "share": 0.5, "raises": 2, "ternary": 0.5, "final": 0.7},
}
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lsq": ({"weights": "int3 channel scale=learned"}, {"weights": "lsq"}),
    "ste, zero points": ({"weights": "int4 group=16 symmetric=false"}, {}),
    "ste, float4": ({"weights": "nvfp4"}, {}),
    "statistics": ({"weights": "midrise2 channel scale=max-entropy"}, {"weights": "statistics"}),
    "pruned": ({"weights": "ternary channel"}, {"weights": "pruned"}),
    "menu": ({"weights": "int4 channel"}, {"weights": {"menu": {"others": ["int2 channel", "nvfp4"]}}}),
    "a tied table": ({"targets": ["Embedding"], "weights": "int4 channel", "ignore": []}, {"weights": "lsq"}),
}
#: Those that are for one part; the others judge what is rounded to the nearest level.
OWN = {"pruning": "pruned", "policy": "menu"}


def cases() -> list[tuple[str, str]]:
    return [(name, s) for name in NAMES for s in SCHEMES if (s == OWN[name] if name in OWN else s not in OWN.values())]


def prepared(scheme: str) -> Any:
    return prepare(tiny_model(dtype=torch.float32), *SCHEMES[scheme]).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, acting: list[Acting], progress: float) -> None:
    optimizer.zero_grad()
    for each in acting:
        each.before_forward(progress, torch.Generator().manual_seed(round(100 * progress)))
    loss = model(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss
    for each in acting:
        each.after_forward(loss.detach())
    loss.backward()
    for each in acting:
        each.before_update(progress)
    optimizer.step()
    for each in acting:
        each.after_update(progress)


@pytest.mark.parametrize(("name", "scheme"), cases())
def test_at_work(name: str, scheme: str) -> None:
    """Attached once or twice the same; numbers of every layer; what is packed is what was trained."""
    model = prepared(scheme)
    acting = make_part(name, BUSY[name]).attach(model)
    state = set(model.state_dict())
    assert set(make_part(name, BUSY[name]).attach(model).weights) == set(acting.weights)
    assert set(model.state_dict()) == state
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    seen = []
    for at in range(6):
        step(model, optimizer, [acting], at / 5)
        seen.append(acting.newest())
    assert all(seen[0].keys() == found.keys() for found in seen) and any(any(found.values()) for found in seen)
    layers = acting.layers()
    assert layers.keys() == acting.weights.keys() and all(row["weights"] > 0 for row in layers.values())
    model.eval()
    before = logits(model)
    packed: Any = convert(model)
    assert torch.equal(logits(packed), before) and not any(name in key for key in packed.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_exactly(name: str) -> None:
    """With the state dict of a model and of its optimizer, between any two updates."""
    models = [prepared(OWN.get(name, "lsq")) for _ in range(2)]
    acting = [make_part(name, BUSY[name]).attach(model) for model in models]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.02) for model in models]
    for at in range(3):
        step(models[0], optimizers[0], [acting[0]], at / 5)
    models[1].load_state_dict({key: t.clone() for key, t in models[0].state_dict().items()})
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for at in range(3, 6):
        for which in range(2):
            step(models[which], optimizers[which], [acting[which]], at / 5)
        assert acting[0].newest() == acting[1].newest()
    assert acting[0].layers() == acting[1].layers()
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str) -> None:
    with pytest.raises(SchemeError, match=rf"callback {name} looks at weights that train.*there are none"):
        make_part(name, {}).attach(prepare(tiny_model(), {"inputs": "int8 token"}))
    why = (
        rf"layers\.0.*learned: {{weights: {OWN[name]}}}"
        if name in OWN
        else "not rounded to the nearest.*ste, lsq or statistics"
    )
    with pytest.raises(SchemeError, match=why):
        make_part(name, BUSY[name]).attach(prepare(tiny_model(), {"weights": "int4 channel"}, {"weights": "flexround"}))
    with pytest.raises(SchemeError, match=f"callbacks: {name} has no option 'rangee'"):
        make_part(name, {"rangee": 1})
    with pytest.raises(SchemeError, match=f"callbacks: {name} takes a mapping"):
        make_part(name, 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="oscillation"):
        make_part("oscilation", {})
