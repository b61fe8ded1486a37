"""What every optimizer must refuse, and what it must survive: each with one clear error, and nothing changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble.optim
from nybble.core.errors import FileError, GranularityError, NybbleError, SchemeError, UsageError
from nybble.optim import REGISTRY, LowBitOptimizer, NonFiniteWarning

NAMES = REGISTRY.names()
SIGNED = [name for name in NAMES if "signed" in REGISTRY.get(name).states.values()]


def build(name: str, params: Any = None, **options: Any) -> LowBitOptimizer:
    """Over a matrix of ones and, for rules that take it, a vector; all states that there may be."""
    kind = REGISTRY.get(name)
    more = {"momentum": 0.9} if "momentum" in kind.options_type.__dataclass_fields__ else {}
    made: LowBitOptimizer = kind(parameters(name) if params is None else params, **(more | {"min_size": 64} | options))
    return made


def parameters(name: str) -> list[tuple[str, nn.Parameter]]:
    made = [("matrix", nn.Parameter(torch.ones(48, 64))), ("vector", nn.Parameter(torch.ones(600)))]
    return [(key, p) for key, p in made if REGISTRY.get(name).refusal(p) is None]


def all_of(optimizer: LowBitOptimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def stepped(optimizer: LowBitOptimizer, first: int, last: int) -> LowBitOptimizer:
    for step in range(first, last):
        for p in all_of(optimizer):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return optimizer


def frozen(optimizer: LowBitOptimizer) -> Any:
    return copy.deepcopy(([p.detach() for p in all_of(optimizer)], optimizer.state_dict()["state"]))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict | list | tuple):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return bool(a == b)


# -------------------------------------------------------------------------------------------------------- when built
@pytest.mark.parametrize("name", NAMES)
def test_states_that_are_none(name: str) -> None:
    for state, message in (("state9", "state9"), ("int8 flat=0", "flat"), (8, "quantizer line"), ({}, "leaves out")):
        with pytest.raises(NybbleError, match=message):
            build(name, state=state)
    with pytest.raises(SchemeError, match="calibrated once"):
        build(name, state=dict.fromkeys(REGISTRY.get(name).states, "state8 static"))


@pytest.mark.parametrize("name", SIGNED)
def test_a_format_that_cannot_hold_a_sign(name: str) -> None:
    kinds = REGISTRY.get(name).states
    for line in ("udynamic8 flat=256", "linear4 rank1", "float8_e8m0fnu flat=32"):
        lines = {state: line if kind == "signed" else None for state, kind in kinds.items()}
        with pytest.raises(SchemeError, match=r"both signs|no zero"):
            build(name, state=lines)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"w: float32, float16 and bfloat16 parameters are served; .*{dtype}"):
        build(name, [("w", nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False))])


# ------------------------------------------------------------------------------------------------------------- steps
def spoil(what: str, p: nn.Parameter) -> Any:
    """Make a step impossible; the closure to step with."""
    match what:
        case "sparse":
            p.grad = torch.ones_like(p).to_sparse()
        case "integers":
            p.grad = None
            p.grad_dtype = torch.int32
            p.grad = torch.ones_like(p, dtype=torch.int32)
        case "shape":
            p.data = torch.ones(96, 64)  # behind backward
        case "dtype":
            p.data, p.grad = p.data.double(), None
            p.grad = torch.ones_like(p)
        case "closures":
            return [lambda: 1.0, lambda: 2.0]
        case "tensor":
            return torch.tensor(1.0)
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sparse", "has a sparse gradient; use a dense one"),
        ("integers", "has a gradient of torch.int32; floating-point ones"),
        ("shape", "has shape .96, 64., and its gradient .*; call zero_grad and backward again"),
        ("dtype", "float32, float16 and bfloat16 parameters are served; this one is torch.float64"),
        ("closures", "one function that evaluates the whole model"),
        ("tensor", "one function that evaluates the whole model"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_steps_that_are_refused(name: str, what: str, message: str) -> None:
    """The last parameter's is wrong, and the first has not moved either."""
    if what == "integers" and not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch gives no parameter a gradient of another dtype")
    optimizer = stepped(build(name), 0, 2)
    closure = spoil(what, all_of(optimizer)[-1])
    before = frozen(optimizer)
    with pytest.raises(UsageError, match=message):
        optimizer.step(closure)
    assert same(frozen(optimizer), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("state", "state9", "state9"),
        ("state", ["state8"], "quantizer line"),
        ("weights", "up", "is one of nearest, stochastic, residual8"),
        ("keep_sign", "yes", "keep_sign is True or False"),
        ("is_paged", 1, "is_paged is True or False"),
    ],
)
def test_groups_that_are_changed_to_what_is_refused(key: str, value: Any, message: str) -> None:
    optimizer = stepped(build("adamw"), 0, 2)
    before = frozen(optimizer)
    old = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(UsageError, match=message):
        optimizer.step()
    optimizer.param_groups[0][key] = old
    assert same(frozen(optimizer), before)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_group_gets_a_line_that_cannot_cut_a_parameter(fresh: bool, fused: bool | None) -> None:
    """The last one's columns; the others have not moved, nor are states begun."""
    shapes = {"a": (48, 64), "b": (4, 128), "c": (48, 65)}
    params = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = stepped(build("adamw", params, fused=fused, state="int8 flat=64"), 0, 0 if fresh else 2)
    before, old = frozen(optimizer), optimizer.param_groups[0]["state"]
    optimizer.param_groups[0]["state"] = "int8 group=64"
    for p in all_of(optimizer):
        p.grad = torch.ones_like(p)
    with pytest.raises(GranularityError, match=r"^c: .*65 columns"):
        optimizer.step()
    optimizer.param_groups[0]["state"] = old
    assert same(frozen(optimizer), before)
    stepped(optimizer, 2, 3)


def test_a_group_whose_weights_no_longer_fit_its_dtype() -> None:
    optimizer = build("adamw", [("w", nn.Parameter(torch.ones(48, 64).half()))])
    optimizer.param_groups[0]["weights"] = "residual8"
    all_of(optimizer)[0].grad = torch.ones(48, 64).half()
    with pytest.raises(UsageError, match="w: weights=residual8 is for bfloat16 parameters"):
        optimizer.step()


def test_a_group_gets_another_preset_by_name() -> None:
    """It is kept in whole lines, each half for its state, as if it had been built so."""
    optimizer, told = stepped(build("adamw"), 0, 2), build("adamw", state="state4")
    optimizer.param_groups[0]["state"] = "state4"
    stepped(optimizer, 2, 3)
    assert optimizer.param_groups[0]["state"] == told.param_groups[0]["state"]
    assert optimizer.state_bytes() == stepped(told, 0, 1).state_bytes()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", NAMES)
def test_another_shape_than_its_states(name: str, fused: bool | None) -> None:
    """A kernel would write beyond their ends."""
    optimizer = stepped(build(name, parameters(name)[::-1], fused=fused), 0, 2)
    *others, last = all_of(optimizer)
    last.data = torch.ones(96, 64)
    before = frozen(optimizer)
    for p in all_of(optimizer):
        p.grad = torch.ones_like(p)
    with pytest.raises(UsageError, match=r"has shape \[96, 64\] now, and its .*: another tensor .*del optimizer.state"):
        optimizer.step()
    assert same(frozen(optimizer), before)
    del optimizer.state[last]
    stepped(optimizer, 2, 3)
    assert int(optimizer.state[last]["step"]) == 1 and all(int(optimizer.state[p]["step"]) == 3 for p in others)


@pytest.mark.parametrize("name", NAMES)
def test_no_numbers(name: str) -> None:
    p = nn.Parameter(torch.ones(48, 64, device="meta"))
    optimizer = build(name, [("w", p)])
    p.grad = torch.ones_like(p)
    with pytest.raises(UsageError, match="w is on the meta device"):
        optimizer.step()
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_no_number(name: str, bad: float) -> None:
    """It is left out and reported: all others step as if it had been 0; 1e38 where its square or a sum is too large."""
    ends = []
    for faulty in (True, False):
        optimizer = stepped(build(name), 0, 2)
        for p in all_of(optimizer):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
            p.grad.view(-1)[7] = bad if faulty else 0.0
        before = [p.detach().clone() for p in all_of(optimizer)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        left_out = optimizer.set_aside()
        assert bool(left_out) == (faulty and (bad != 1e38 or "nonnegative" in optimizer.states.values()))
        if left_out:
            assert left_out == {key: 1 for key, _ in parameters(name)}
            assert [w.category for w in said] == [NonFiniteWarning] and "matrix" in str(said[0].message)
            for p, old in zip(all_of(optimizer), before, strict=True):
                assert p.view(-1)[7] == old.view(-1)[7]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stepped(optimizer, 3, 5)
        for entry in optimizer.state.values():
            for kept in entry.values():
                assert (kept if isinstance(kept, Tensor) else kept.dequantize()).isfinite().all()
        assert all(p.isfinite().all() for p in all_of(optimizer))
        ends.append([torch.cat([p.view(-1)[:7], p.view(-1)[8:]]).detach() for p in all_of(optimizer)])
    if bad != 1e38 and REGISTRY.get(name).elementwise:  # its block's scale is that of the others
        assert same(ends[0], ends[1])


# ----------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_others(name: str) -> None:
    """Another rule's, of another shape, with other groups, of a model, of nothing: refused, and nothing changes."""
    optimizer = stepped(build(name), 0, 2)
    before, own = frozen(optimizer), optimizer.state_dict()
    for other in NAMES:
        theirs = stepped(build(other, parameters(name) if other != "muon" else parameters("muon")), 0, 1)
        if REGISTRY.get(other).states.keys() == REGISTRY.get(name).states.keys():
            continue  # Adam and AdamW go on with each other's, as torch's do
        with pytest.raises((FileError, UsageError), match=r"were saved|same parameters|shape|torch's|number"):
            optimizer.load_state_dict(theirs.state_dict())
    small = [(key, nn.Parameter(torch.ones(tuple(n // 2 for n in p.shape)))) for key, p in parameters(name)]
    wrong: tuple[tuple[Any, str], ...] = (
        (stepped(build(name, small), 0, 1).state_dict(), "shape"),
        ({**own, "param_groups": own["param_groups"] * 2}, "same parameters in the same groups"),
        (nn.Linear(2, 2).state_dict(), "not an optimizer's state dict"),
        ([], "not an optimizer's state dict"),
        (None, "not an optimizer's state dict"),
        ("state.pt", "not an optimizer's state dict"),
        ({**own, "state": {str(i): entry for i, entry in own["state"].items()}}, "states of '0'.*JSON"),
        ({**own, "state": {**own["state"], 0: {**own["state"][0], "step": torch.ones(2)}}}, "number of steps taken"),
    )
    for saved, message in wrong:
        with pytest.raises((FileError, UsageError), match=message):
            optimizer.load_state_dict(saved)
    assert same(frozen(optimizer), before)


@pytest.mark.filterwarnings("ignore")
def test_torchaos_states_are_no_floats() -> None:
    """Tensors of their classes say that they are float32; read as such they would be kept as they are."""
    theirs = pytest.importorskip("torchao.optim", reason="a peer: pip install torchao", exc_type=ImportError)
    p = nn.Parameter(torch.ones(64, 64))
    peer = theirs.AdamW8bit([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    peer.step()
    for name in ("AdamW", "AdamW8bit", "AdamW32bit"):
        for convert in (False, True):
            ours = getattr(nybble.optim, name)([nn.Parameter(torch.ones(64, 64))])
            with pytest.raises(NybbleError, match=r"found OptimState8bit|lr is a number"):
                ours.load_state_dict(peer.state_dict(), convert=convert)


class Narrow(Tensor):
    """A tensor subclass that says that it is float32, as torchao's."""


def test_subclasses_of_tensors_are_no_states() -> None:
    optimizer = stepped(build("adamw", state=None), 0, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].as_subclass(Narrow)
    with pytest.raises(FileError, match=r"matrix: exp_avg: a state is a floating-point tensor .*; found Narrow"):
        build("adamw", state=None).load_state_dict(saved)
