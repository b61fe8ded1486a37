"""Recipes of steps in any order: what makes sense runs, what can't work is said with both names and the reason."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tests.tiny import save_text, save_tiny, tiny_model, tiny_tokenizer

import nybble
from nybble.calibration.trace import HIDDEN
from nybble.calibration.window import Window
from nybble.core.errors import DeviceError, SchemeError, UsageError
from nybble.core.options import build
from nybble.core.registry import Registry
from nybble.data import load_text, token_samples
from nybble.learned import make_part
from nybble.models.adapter import adapter_for
from nybble.pipelines.quantize import preflight
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.recipe import KINDS, parse_recipe
from nybble.reconstruction import make_reconstruction
from nybble.scheme import parse_scheme
from nybble.solvers import make_solver
from nybble.walk.estimate import Estimate, estimate
from nybble.walk.plan import make_plan
from nybble.walk.steps import Cost, Load, Subject
from nybble.walk.steps.correction import CorrectionStep
from nybble.walk.steps.make import make_finishes, make_steps
from nybble.walk.steps.transform import TransformStep

SCHEME = {"weights": "int4 group=16", "inputs": "int8 tensor static"}
STEP: dict[str, dict[str, Any]] = {
    "train": {"train": "restorative-lora", "steps": 1, "rank": 2},
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


WALKED = [c for n in range(1, 5) for c in itertools.combinations(KINDS[1:], n)]  # training is over before a walk


@pytest.mark.parametrize("kinds", [*WALKED, KINDS[:1], KINDS], ids="-".join)
def test_every_sensible_order_runs(kinds: tuple[str, ...], model: str, text: str) -> None:
    """Any of the kinds may be missing; a missing solver is rtn, and the manifest says so."""
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
    if after == "train":  # which a training of another sort may be: distill
        with pytest.raises(SchemeError, match=r"'restorative-lora' makes other float weights.*put it first"):
            make_finishes(recipe(*steps))
        make_finishes(recipe(steps[0], {"train": "distill"}))
        return
    names = [step[kind] for step, kind in zip(steps, (before, after), strict=True)]
    with pytest.raises(SchemeError, match=f"{after} '{names[1]}' can't come after {before} '{names[0]}': .*order is"):
        recipe(*steps)


def test_a_training_behind_all_kinds(model: str, text: str) -> None:
    steps = [*(STEP[kind] for kind in KINDS), {"train": "distill", "steps": 2, "every": 1}]
    found, report = nybble.quantize(model, recipe(*steps), text, settings=SETTINGS)
    assert [next(iter(step)) for step in report.manifest["recipe"]["steps"]] == [*KINDS, "train"]
    assert isinstance(found.model.layers[0].mlp.down_proj.weight.qtensor(), LowRankSum)
    assert all("held back" in row.notes[-1] for row in report.layers)


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
        (
            {"weights": "adaround", "schedule": "cosin"},
            r"is cosine or linear or constant; got 'cosin'\. Did you mean 'cosine'",
        ),
        ({}, "learns nothing without a part"),
        ({"weights": "adaround", "window": 2, "overlap": 2}, "window=2, overlap=2"),
        ({"weights": "adaround", "steps": 0}, "steps=0 must be 1 or more"),
        ({"weights": "adaround", "penalty": -1}, "penalty=-1 0 or more"),
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


def test_a_part_is_a_name_or_a_mapping_or_made_in_python() -> None:
    """``weights: adaround``, ``weights: {adaround: }`` and an object are the same."""
    part = make_part("adaround", {})
    found = [make_reconstruction("mse", {"weights": given}) for given in ("adaround", {"adaround": None}, part)]
    assert [made.weights for made in found] == [part] * 3
    changed = make_reconstruction("mse", {"weights": {"adaround": {"beta_start": 10}}})
    assert changed.weights == make_part("adaround", {"beta_start": 10.0}) != part
    with pytest.raises(SchemeError, match="weights is the name of a learned part"):
        make_reconstruction("mse", {"weights": {"adaround": 3}})


def test_inputs_are_learned_where_weights_stay_in_float(model: str, text: str) -> None:
    steps = [{"reconstruction": "mse", "inputs": "lsq", "steps": 4, "rates": {"default": 1e-3}}]
    found, report = nybble.quantize(model, recipe(*steps, inputs="int4 tensor static"), text, settings=SETTINGS)
    _, plain = nybble.quantize(model, recipe({"solver": "rtn"}, inputs="int4 tensor static"), text, settings=SETTINGS)
    for row, was in zip(report.layers, plain.layers, strict=True):
        layer: Any = found.get_submodule(row.name)
        assert row.weights is None and row.input_scale == float(layer.inputs.scale) > 0
        went_back = any("went back" in note for note in row.notes)
        assert row.notes and (row.input_scale == was.input_scale) == went_back
    assert any(row.input_scale != was.input_scale for row, was in zip(report.layers, plain.layers, strict=True))


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
    measured = recipe({"reconstruction": "mse", "inputs": "lsq"}, weights="int4 group=16", inputs="int8 token")
    with pytest.raises(SchemeError, match=r"model\.layers\.0\.self_attn\.q_proj.*lsq learns one scale"):
        nybble.quantize(model, measured, text, settings=SETTINGS)
    searched = recipe({"solver": "rtn", "scale": "mse"}, {"reconstruction": "mse", "weights": "clip"})
    with pytest.raises(SchemeError, match=r"model\.layers\.0\.self_attn\.q_proj.*clip"):
        nybble.quantize(model, searched, text, settings=SETTINGS)
    two = [{**STEP["reconstruction"], "window": size} for size in (1, 2)]
    with pytest.raises(SchemeError, match=r"different windows: step 2 has window 1 .* step 3 has window 2"):
        nybble.quantize(model, recipe(*two), text, settings=SETTINGS)


def test_experts_are_not_learned(tmp_path: Path, text: str) -> None:
    """Each of their matrices reads rows of its own, and no twin stands for them: alone there is nothing to learn."""
    folder, scheme = save_tiny(tmp_path / "moe", "mixtral"), {"targets": ["Experts"], "weights": "int4 group=16"}
    made = parse_recipe({"name": "made", "scheme": scheme, "steps": [STEP["reconstruction"]]})
    with pytest.raises(SchemeError, match="finds nothing to learn"):
        nybble.quantize(str(folder), made, text, settings=SETTINGS)


def test_a_part_behind_code_books_is_refused_before_anything_runs(model: str, text: str) -> None:
    """Few parts learn a code book of vectors; the inputs in front of one are learned all the same."""
    books, clip = {"solver": "k-means", "entries": 16, "width": 2, "iterations": 1}, {"weights": "clip"}
    learn: dict[str, Any] = {"reconstruction": "mse", "steps": 2}
    says = r"reconstruction 'mse': {} can't learn what solver 'k-means' leaves, code books.*solver: rtn or gptq"
    for options, name in ((clip, "clip"), ({**clip, "inputs": "lsq"}, "clip"), ({"block": "let"}, "let")):
        wrong = recipe(books, {**learn, **options}, weights="int2 channel", inputs="int8 tensor static")
        with pytest.raises(SchemeError, match=says.format(name)):
            preflight(model, wrong, text, settings=SETTINGS)
    right = recipe(books, {**learn, "inputs": "lsq"}, weights="int2 channel", inputs="int8 tensor static")
    _, report = nybble.quantize(model, right, text, settings=SETTINGS)
    assert all(layer.learned and layer.learned["windows"] for layer in report.layers)


def test_a_window_in_which_nothing_can_be_learned_stays(model: str, text: str) -> None:
    """A block in float between those that learn."""
    rules = {"weights": "int4 group=16", "ignore": ["re:.*layers.0.*", "lm_head"]}
    made = parse_recipe({"name": "made", "scheme": rules, "steps": [STEP["reconstruction"]]})
    _, report = nybble.quantize(model, made, text, settings=SETTINGS)
    assert report.layers and all(row.name.startswith("model.layers.1") and row.learned for row in report.layers)


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
    with pytest.raises(DeviceError, match=r"0\.3 GB are needed.*Its 2 blocks at once take 0\.\d GB\. .*window: 1"):
        nybble.quantize(model, wide, text, out=tmp_path / "out", settings=SETTINGS)
    assert not list(tmp_path.glob("out*"))


class Weighed(TransformStep):
    """Holds 1000 bytes of a block, takes 10 while it runs it and others when it doesn't, and does nothing."""

    def __init__(self, window: int, alone: int = 0, learning: int = 0) -> None:
        self.window, self.alone, self.learning = window, alone, learning

    def cost(self, subject: Subject, targets: Any, load: Load) -> Cost:
        return Cost(held=1000, learning=self.learning, peak=10, alone=self.alone)


@pytest.mark.parametrize(("window", "together"), [(1, 1), (2, 2), (3, 2)])
def test_an_estimate_counts_the_blocks_that_are_in_memory_together(window: int, together: int) -> None:
    """The model has two; what a step takes while it runs, it takes for one block after the other."""
    model = tiny_model(dtype=torch.float32)
    adapter = adapter_for(model)
    plan = make_plan(model, adapter, parse_scheme(SCHEME), make_solver("rtn", {}))
    subject = Subject(model=model, adapter=adapter, plan=plan)

    def found(window: int) -> Estimate:
        load = Load(samples=0, seq_len=0, batch=1, dtype=torch.float32, source_bytes=2, window=window)
        return estimate(subject, [Weighed(window)], load, 1e9)

    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert found(window).window == together * (block * (2 + 4) + 1000) + 10  # as it is stored, and in float32
    assert found(window).memory - found(1).memory == found(window).window - found(1).window


def test_what_is_needed_when_no_block_runs_does_not_add_up_with_what_a_block_needs() -> None:
    model = tiny_model(dtype=torch.float32)
    adapter = adapter_for(model)
    plan = make_plan(model, adapter, parse_scheme(SCHEME), make_solver("rtn", {}))
    subject = Subject(model=model, adapter=adapter, plan=plan)
    load = Load(samples=4, seq_len=16, batch=2, dtype=torch.float32, source_bytes=4)
    found = [estimate(subject, [Weighed(1, alone)], load, 1e9).window for alone in (0, 5, 10**9, 10**9 + 7)]
    assert found[0] == found[1] < 10**9 < found[2] == found[3] - 7
    steps = [Weighed(1, learning=7), Weighed(1, learning=70), Weighed(1)]  # they learn one after the other
    assert estimate(subject, steps, load, 1e9).window == found[0] + 2 * 1000 + 70


@pytest.mark.parametrize(
    ("solver", "more", "path", "paths"),
    [
        ("gptq", {}, "quantized", {"quantized"}),
        ("gptq", {"feed": "float"}, "float", {"float", "quantized"}),
        ("gptq", {"feed": "quantized"}, "float", {"float", "quantized"}),
        ("llm-fp4", {}, "float", {"float"}),
        ("llm-fp4", {"feed": "float"}, "float", {"float"}),
        ("llm-fp4", {"feed": "quantized"}, "float", {"float", "quantized"}),
    ],
)
def test_steps_look_at_the_float_path_where_there_is_one(
    solver: str, more: dict[str, str], path: str, paths: set[str]
) -> None:
    """And no stream is kept that nothing reads."""
    learned = [{**STEP["reconstruction"], **more}] if more else []
    made = recipe({"transform": "smooth"}, {"solver": solver}, *learned, {"correction": "bias"})
    steps, found = make_steps(made, adapter_for(tiny_model()))
    assert found == paths
    assert [step.path for step in steps if isinstance(step, TransformStep | CorrectionStep)] == [path, path]


def test_steps_that_find_nothing_need_no_data(model: str) -> None:
    """No BatchNorm to fold, no layer to correct: weights alone are rounded, and nothing is calibrated."""
    steps: list[dict[str, Any]] = [{"transform": "fold-batchnorm"}, {"correction": "bias", "targets": ["Conv"]}]
    _, report = nybble.quantize(model, recipe(*steps, weights="int8 channel"))
    assert report.manifest["data"] is None


@pytest.mark.parametrize("feed", ["float", "quantized"])
def test_a_window_reads_what_the_float_network_computes(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, feed: str
) -> None:
    """In front of each of its blocks, although those before it are quantized; the other path goes its own way."""
    folder = save_tiny(tmp_path / "deep", num_hidden_layers=4)
    tokens = token_samples(load_text(text, "calibration"), tiny_tokenizer(), samples=5, seq_len=8)
    exact, windows = nybble.load(folder, dtype=torch.float32)[0], list[int]()

    def see(window: Window, options: Any) -> None:
        first = 2 * len(windows)
        windows.append(len(window.blocks))
        assert window.calibration.batches == 3  # the last has one sample
        for block in range(2):
            found = [given[HIDDEN] for _, given in window.inputs("float", block)]
            for number, hidden in enumerate(found):
                wanted = exact(tokens.input_ids[2 * number : 2 * number + 2], output_hidden_states=True).hidden_states
                assert torch.equal(hidden, wanted[first + block])
            other = [given[HIDDEN] for _, given in window.inputs("quantized", block)]
            assert len(found) == len(other) == 3
            same = [torch.equal(a, b) for a, b in zip(found, other, strict=True)]
            assert same == [first + block == 0] * 3
        assert all(record.sample is not None for state in window.blocks for record in state.records.values())

    monkeypatch.setattr("nybble.walk.steps.reconstruction.learn", see)
    step = {**STEP["reconstruction"], "window": 2, "feed": feed}
    solver = "rtn" if feed == "quantized" else "gptq"
    nybble.quantize(folder, recipe({"solver": solver}, step), tokens, settings=dataclasses.replace(SETTINGS, samples=5))
    assert windows == [2, 2]


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
    level: Literal[0, 1] = 0
    count: int | str = 1
    derived: int = dataclasses.field(default=7, init=False)


def test_options_are_typed_by_their_annotations() -> None:
    given = {
        "needed": 3, "ratio": 1, "on": True, "word": "b", "maybe": None, "sizes": [1, 2], "pair": [2, "y"],
        "rates": {"a": 1, 2: 3}, "inner": {"depth": 4}, "level": 1, "count": "all",
    }  # fmt: skip
    made = build(Options, given, "thing")
    assert made == Options(
        needed=3, ratio=1.0, on=True, word="b", sizes=(1, 2), pair=(2.0, "y"), rates={"a": 1.0, "2": 3.0},
        inner=Inner(depth=4), level=1, count="all",
    )  # fmt: skip
    assert type(made.ratio) is float  # 1 equals 1.0, but says something else in a report
    assert build(Options, {"needed": 1, "inner": made.inner}, "thing").inner is made.inner
    for wrong, said in (
        ({}, "needs the option 'needed'"), ({"needed": True}, "needed is an int; got True"),
        ({"needed": 1, "ratio": "x"}, "ratio is a float"), ({"needed": 1, "on": 1}, "on is a bool"),
        ({"needed": 1, "maybe": "x"}, "maybe is an int"), ({"needed": 1, "sizes": 3}, "sizes is a list"),
        ({"needed": 1, "sizes": [1, "b"]}, r"sizes\[1\] is an int"), ({"needed": 1, "pair": [1]}, "2 values; got 1"),
        ({"needed": 1, "rates": [1]}, "rates is a mapping"), ({"needed": 1, "inner": {"dept": 1}}, "no option 'dept'"),
        ({"needed": 1, "word": "c"}, "word is a or b"),
        ({"needed": 1, "ratio": True}, "ratio is a float; got True"),
        ({"needed": 1, "level": True}, "level is 0 or 1; got True"),
        ({"needed": 1, "derived": 8}, "no option 'derived'"),
        ({"needed": 1, "count": 1.5}, "count is int or str; got 1.5"), ({"needded": 1}, "Did you mean 'needed'"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=said):
            build(Options, wrong, "thing")
