"""What FLIQS must show beside its policy (parts/training/test_policy.py): one path of weights, whatever the menu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import input_ids, tiny_model
from torch import nn

from nybble.core.errors import SchemeError
from nybble.learned import Menu
from nybble.training.callbacks import make_part
from nybble.training.callbacks.policy import Choosing
from nybble.training.memory import keeping
from nybble.training.prepare import prepare

SCHEME = {"weights": "int4 channel", "inputs": "int4"}
OTHERS = ("int2", "int3", "int5", "int6", "int8", "e2m1", "e4m3")


def prepared(menu: int) -> Any:
    """With so many formats for each side; 0: without a menu."""
    learned = {
        "weights": {"menu": {"others": [f"{name} channel" for name in OTHERS[: menu - 1]]}},
        "inputs": {"menu": {"others": list(OTHERS[: menu - 1])}},
    }
    return prepare(tiny_model(dtype=torch.float32), SCHEME, learned if menu else {}).train()


def attached(model: nn.Module, **options: Any) -> Choosing:
    found = make_part("policy", {"delay": 0.0, **options}).attach(model)
    assert isinstance(found, Choosing)
    return found


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=input_ids(), labels=input_ids(), use_cache=False).loss
    return loss


def test_a_menu_of_one_is_plain_training_bit_for_bit() -> None:
    models = [prepared(0), prepared(1)]
    acting, found = attached(models[1]), []
    for model in models:
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for step in range(3):
            if model is models[1]:
                acting.before_forward(step / 2, torch.Generator().manual_seed(step))
            loss = loss_of(model)
            if model is models[1]:
                acting.after_forward(loss.detach())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == found[1] and len(set(found[0])) == 3


@pytest.mark.parametrize("menu", [2, 4, 8])
def test_what_is_kept_for_backward_does_not_grow_with_the_menu(menu: int) -> None:
    """At most 1.15 times plain training (check 8); parameters don't grow either."""
    sizes = []
    for model in (prepared(0), prepared(menu)):
        if menu and any(isinstance(module, Menu) for module in model.modules()):
            attached(model).before_forward(0.5, torch.Generator().manual_seed(0))
        with keeping(model) as kept:
            loss_of(model)
        sizes.append((sum(kept.values()), sum(p.numel() for p in model.parameters())))
    assert 0 < sizes[1][0] <= 1.15 * sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_all_of_a_group_draw_together_and_both_sides_of_a_layer_too() -> None:
    model = prepared(4)
    names = [name for name, module in model.named_modules() if isinstance(getattr(module, "inputs", None), Menu)]
    groups = {"a": names[:3], **{name: [name] for name in names[3:]}}
    acting = attached(model, groups=groups, target=3.0, settle=0.5)
    twins = [model.get_submodule(name) for name in names]
    for step in range(4):
        acting.before_forward(step / 10, torch.Generator().manual_seed(step))
        drawn = [twin.weight.learned.index for twin in twins]
        assert drawn == [twin.inputs.index for twin in twins]
        assert len(set(drawn[:3])) == 1 and len(set(drawn)) > 1
        acting.after_forward(torch.tensor(1.0))
    acting.before_forward(0.6, torch.Generator())  # nothing is drawn from here on, and the cost is kept
    acting.after_update(0.6)
    settled = [twin.weight.learned.index for twin in twins]
    acting.after_forward(torch.tensor(1.0))
    assert acting.newest()["cost"] <= 3.0
    acting.before_forward(0.7, torch.Generator())
    assert [twin.weight.learned.index for twin in twins] == settled


def test_groups_and_costs_that_do_not_fit() -> None:
    model = prepared(2)
    names = [name for name, module in model.named_modules() if isinstance(getattr(module, "inputs", None), Menu)]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"groups": {"a": names[:2]}}, f"{names[2]} is in none"),
        ({"groups": {"a": names, "b": names[:1]}}, f"{names[0]} is in a and b"),
        ({"groups": {"a": [*names, "x"]}}, "x has no menu"),
        ({"costs": {names[0]: [1.0]}}, f"costs of {names[0]} are 1 for 2 formats"),
        ({"target": 1.0, "settle": 0.9}, "target=1 can't be met; the least is 2"),
        ({"target": 0.0}, "target=0 is a cost"),
    ]
    for options, message in bad:
        with pytest.raises(SchemeError, match=message):
            attached(model, **options)
