"""Recipes of steps in any order: what makes sense runs, what can't work is said with both names and the reason."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tests.tiny import save_text, save_tiny

import nybble
from nybble.core.errors import DeviceError, SchemeError, UsageError
from nybble.core.options import build, plain
from nybble.core.registry import Registry
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.recipe import KINDS, parse_recipe
from nybble.reconstruction import make_reconstruction

SCHEME = {"weights": "int4 group=16", "inputs": "int8 tensor static"}
STEP: dict[str, dict[str, Any]] = {
    "transform": {"transform": "smooth"},
    "solver": {"solver": "gptq"},
    "reconstruction": {"reconstruction": "mse", "weights": "adaround", "steps": 2},
    "correction": {"correction": "low-rank", "rank": 2},
}
SETTINGS = nybble.Settings(samples=4, seq_len=8, batch=2, dtype=torch.float32)


def recipe(*steps: dict[str, Any], **scheme: str) -> Any:
    return parse_recipe({"name": "made", "scheme": scheme or SCHEME, "steps": list(steps)})


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny(tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(save_text(tmp_path / "text.txt"))


@pytest.mark.parametrize("kinds", [c for n in range(1, 5) for c in itertools.combinations(KINDS, n)], ids="-".join)
def test_every_sensible_order_runs(kinds: tuple[str, ...], model: str, text: str) -> None:
    """Any of the four kinds may be missing; a missing solver is rtn, and the manifest says so."""
    found, report = nybble.quantize(model, recipe(*(STEP[kind] for kind in kinds)), text, settings=SETTINGS)
    steps = report.manifest["recipe"]["steps"]
    assert [next(k for k in KINDS if k in step) for step in steps] == [k for k in KINDS if k in (*kinds, "solver")]
    assert all(row.weights is not None and row.inputs is not None for row in report.layers)
    packed = found.model.layers[0].mlp.down_proj.weight.qtensor()
    assert isinstance(packed, LowRankSum) == ("correction" in kinds)
    notes = " ".join(report.layers[0].notes)
    assert ("window of 1" in notes or "went back" in notes) == ("reconstruction" in kinds)
    assert ("rank 2" in notes) == ("correction" in kinds)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(KINDS, KINDS)))
def test_orders_that_cannot_work_name_both(before: str, after: str) -> None:
    order = [KINDS.index(before), KINDS.index(after)]
    steps = [STEP[before], STEP[after]]
    if order == sorted(order) and not (before == after == "solver"):
        recipe(*steps)
        return
    names = [step[kind] for step, kind in zip(steps, (before, after), strict=True)]
    with pytest.raises(SchemeError, match=f"{after} '{names[1]}' can't come after {before} '{names[0]}': .*order is"):
        recipe(*steps)


def test_several_of_a_kind(model: str, text: str) -> None:
    steps = [
        {"transform": "smooth"}, {"transform": "permute"}, {"solver": "gptq"}, STEP["reconstruction"],
        {"reconstruction": "mse", "inputs": "lsq", "steps": 2}, {"correction": "low-rank", "rank": 1},
        {"correction": "bias"},
    ]  # fmt: skip
    _, report = nybble.quantize(model, recipe(*steps), text, settings=SETTINGS)
    notes = report.layers[0].notes
    assert sum("window of 1" in note or "went back" in note for note in notes) == 2
    assert any("bias moved" in note for note in report.layers[0].notes)  # attention_bias: q_proj has one


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "adaround", "steps": "many"}, "reconstruction loss 'mse': steps is an int; got 'many'"),
        ({"weights": "adaround", "rates": {"rounding": "fast"}}, "rates.rounding is a float; got 'fast'"),
        ({"weights": "adaround", "rates": {"roundin": 0.1}}, "no learned part has the group 'roundin'"),
        ({"weights": "adaronud"}, "unknown learned part 'adaronud'. Did you mean 'adaround'"),
        ({"weights": {"adaround": {"bta": 3}}}, "learned part 'adaround' has no option 'bta'"),
        ({"weights": ["adaround"]}, r"weights is the name of a learned part, or \{name: \{option: value\}\}"),
        ({"weights": "adaround", "schedule": "cosin"}, "schedule is cosine or constant; got 'cosin'"),
        ({}, "learns nothing without a part"),
        ({"weights": "adaround", "window": 2, "overlap": 2}, "window=2, overlap=2"),
        ({"weights": "adaround", "steps": 0}, "steps=0 must be 1 or more"),
        ({"weights": "adaround", "rates": {"rounding": -0.1}}, "rates: rounding is -0.1"),
        ({"weights": "adaround", "rates": {"rounding": float("nan")}}, "rates.rounding is a finite number; got nan"),
        ({"weights": "adaround", "penalty": float("inf")}, "penalty is a finite number; got inf"),
        ({"weights": {"clip": {"start": -50}}}, "start=-50 leaves next to nothing"),
        ({"weights": "ste"}, "nothing to learn with ste alone"),
    ],
)  # fmt: skip
def test_options_of_the_wrong_type(options: dict[str, Any], said: str) -> None:
    with pytest.raises((SchemeError, UsageError), match=said):
        make_reconstruction("mse", options)


def test_a_part_that_cannot_train_a_format_names_the_layer(model: str, text: str) -> None:
    wrong = recipe(STEP["reconstruction"], weights="int4 group=16 rounding=stochastic")
    with pytest.raises(SchemeError, match=r"model\.layers\.0\.self_attn\.q_proj.*adaround can't learn .*stochastic"):
        nybble.quantize(model, wrong, text, settings=SETTINGS)
    nothing = recipe({"reconstruction": "mse", "inputs": "lsq"}, weights="int4 group=16")
    with pytest.raises(SchemeError, match="finds nothing to learn"):
        nybble.quantize(model, nothing, text, settings=SETTINGS)
    beside = recipe({"reconstruction": "mse", "weights": "adaround", "inputs": "lsq"}, weights="int4 group=16")
    with pytest.raises(SchemeError, match="learns inputs, and the scheme rounds none"):
        nybble.quantize(model, beside, text, settings=SETTINGS)
    two = [{**STEP["reconstruction"], "window": size} for size in (1, 2)]
    with pytest.raises(SchemeError, match="different windows"):
        nybble.quantize(model, recipe(*two), text, settings=SETTINGS)


def test_a_window_in_which_nothing_can_be_learned_stays(model: str, text: str) -> None:
    """Split tensors have no learned part: the solver's codes stay, and the report says so."""
    split = recipe(
        {"solver": "outlier-columns"}, {"reconstruction": "mse", "weights": "clip", "steps": 2}, weights="int4 group=16"
    )
    _, report = nybble.quantize(model, split, text, settings=SETTINGS)
    assert all("nothing in it can be learned" in " ".join(layer.notes) for layer in report.layers)


def test_a_corrections_pattern_that_matches_nothing(model: str, text: str) -> None:
    for pattern, hint in (("nope", ""), ("Linaer", "Did you mean 'Linear'")):
        wrong = recipe({"correction": "bias", "targets": [pattern]}, weights="int4 group=16")
        with pytest.raises(SchemeError, match=f"the target '{pattern}' matches nothing.*{hint}"):
            nybble.quantize(model, wrong, text, settings=SETTINGS)
    absent = recipe({"correction": "bias", "targets": ["Conv"]}, weights="int4 group=16")  # a kind, just not here
    nybble.quantize(model, absent, text, settings=SETTINGS)


def test_a_window_larger_than_the_memory_says_how_much(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.core.device.available_memory", lambda: 10**7)
    wide = recipe({**STEP["reconstruction"], "window": 2})
    with pytest.raises(DeviceError, match=r"0\.3 GB are needed.*a smaller window \(its 2 blocks take 0\.\d GB\)"):
        nybble.quantize(model, wide, text, out=tmp_path / "out", settings=SETTINGS)
    assert not list(tmp_path.glob("out*"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    registry: ClassVar[Registry | None] = None
    needed: int
    ratio: float = 0.5
    on: bool = False
    word: Literal["a", "b"] = "a"
    maybe: int | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[float, str] = (1.0, "x")
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()


def test_options_are_typed_by_their_annotations() -> None:
    given = {
        "needed": 3, "ratio": 1, "on": True, "word": "b", "maybe": None, "sizes": [1, 2], "pair": [2, "y"],
        "rates": {"a": 1}, "inner": {"depth": 4},
    }  # fmt: skip
    made = build(Options, given, "thing")
    assert made == Options(
        needed=3, ratio=1.0, on=True, word="b", sizes=(1, 2), pair=(2.0, "y"), rates={"a": 1.0}, inner=Inner(depth=4)
    )
    assert build(Options, plain(made), "thing") == made
    for wrong, said in (
        ({}, "needs the option 'needed'"), ({"needed": True}, "needed is an int; got True"),
        ({"needed": 1, "ratio": "x"}, "ratio is a float"), ({"needed": 1, "on": 1}, "on is a bool"),
        ({"needed": 1, "maybe": "x"}, "maybe is an int"), ({"needed": 1, "sizes": 3}, "sizes is a list"),
        ({"needed": 1, "sizes": [1, "b"]}, r"sizes\[1\] is an int"), ({"needed": 1, "pair": [1]}, "2 values; got 1"),
        ({"needed": 1, "rates": [1]}, "rates is a mapping"), ({"needed": 1, "inner": {"dept": 1}}, "no option 'dept'"),
        ({"needed": 1, "word": "c"}, "word is a or b"), ({"needded": 1}, "Did you mean 'needed'"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=said):
            build(Options, wrong, "thing")
