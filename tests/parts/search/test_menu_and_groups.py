"""What a user may ask for, and which layers have to agree."""

from __future__ import annotations

import re

import pytest
import torch
from tests.tiny import input_ids, tiny_model

from nybble.core.errors import SchemeError, UsageError
from nybble.nn.kinds import targets_of
from nybble.recipes.search import REGISTRY
from nybble.search.groups import found_groups, given_groups, see
from nybble.search.menu import parse_menu
from nybble.search.recipe import load_search_recipe, parse_search_recipe


def test_a_menu() -> None:
    found = parse_menu("int4, nvfp4,int8 channel,table[-1,0,1] channel,float4_e2m1fn group=32 scale=mse(grid=20)")
    assert [str(q).split()[0] for q in found.values()] == [
        "int4", "float4_e2m1fn", "int8", "table[-1.0,0.0,1.0]", "float4_e2m1fn",
    ]  # fmt: skip
    assert str(found["int4"].fitted((8, 96))) == "int4 group=64 pad=true"
    assert str(found["int4"].fitted((8, 128))) == "int4 group=64"


@pytest.mark.parametrize(
    ("menu", "message"),
    [
        ("", "the menu is empty"), ([], "the menu is empty"), ("int4,,int8", "empty item"),
        ("int4,int8,int4", "has 'int4' twice"), ("int4,int4 group=64 pad=true", "twice (as 'int4')"),
        ("int4,itn8", "unknown format or preset 'itn8'"),
    ],
)  # fmt: skip
def test_bad_menus(menu: str | list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_menu(menu)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_that_read_one_input_are_one_group(family: str) -> None:
    model = tiny_model(family, torch.float32).eval()
    targets = [t for name, t in targets_of(model).items() if t.matrices and (".layers." in name or ".h." in name)]
    ids = input_ids()[:1]
    seen = see(model, targets, lambda: model(input_ids=ids))
    names = [target.name for target in targets]
    groups = [[names[i].rpartition(".")[2] for i in members] for members in found_groups(names, seen.readers)]
    expected = {
        "llama": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
        "gpt2": [["c_attn"], ["c_proj"], ["c_fc"]],
        "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    }[family]
    assert all(group in groups for group in expected)
    for target in targets:  # each token meets each matrix once, of experts those that it is sent to
        rows = ids.shape[1] * (2 if target.matrices > 1 else 1)
        assert seen.macs[target.name] == rows * target.shape[0] * target.shape[1]


def test_experts_that_see_no_token_are_with_the_others() -> None:
    names = [f"b.0.experts.{i}.w{j}" for i in range(3) for j in (1, 2)] + ["b.0.gate", "b.1.experts.0.w1"]
    assert found_groups(names, [["b.0.experts.0.w1", "b.0.gate"]]) == [[0, 1, 2, 3, 4, 5, 6], [7]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a", "b"], ["b", "c"]], "b is in the groups 1 and 2"), ([["a"], ["c"]], "b is in no group"),
        ([["a", "b", "c"], []], "group 2 has no layer"), ([["a", "b", "d"]], "'d', which isn't searched"),
    ],
)  # fmt: skip
def test_bad_groups(groups: list[list[str]], message: str) -> None:
    assert given_groups(["a", "b", "c"], [["c", "a"], ["b"]]) == [[2, 0], [1]]
    with pytest.raises(UsageError, match=re.escape(message)):
        given_groups(["a", "b", "c"], groups)


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_recipe_reads_back(name: str) -> None:
    made = load_search_recipe(name)
    assert made.name == name and made.summary
    assert parse_search_recipe(made.to_dict()) == made


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"sensitivity": "kl"}, SchemeError, "lacks a loop"),
        ({"sensitivity": "kl", "loop": "ilp", "steps": []}, SchemeError, "no key 'steps'"),
        ({"sensitivity": "kll", "loop": "ilp"}, UsageError, "unknown sensitivity 'kll'"),
        ({"sensitivity": {"hessian-trace": {"probes": 0}}, "loop": "ilp"}, UsageError, "probes is 0"),
    ],
)
def test_bad_recipes(data: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_search_recipe(data)
