"""What every optimizer must do: equal its torch twin without quantizers, resume unchanged, hold the bytes foretold."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nybble.optim import REGISTRY, LowBitOptimizer, flatten, unflatten

NAMES = REGISTRY.names()
SHAPES = ((24, 40), (0, 4), (700,), (3, 5, 7), (), (7, 15))
LINES = (
    "state8",
    "state4",
    "state8 flat=64 rounding=stochastic",
    "int8 flat=100",
    "float8_e4m3fn channel",
    "float4_e2m1fn flat=16 scale_format=(float8_e4m3fn tensor)",
    "uint8 flat=64 symmetric=false",
    "int6 flat=50 scale=minmax(offset=true) scale_format=bfloat16 offset_format=bfloat16",
    "dynamic8 rank1",
    "float16_e8m7 tensor scale=one",
    "state8-companded",
)
"""Formats with and without a zero, offsets, nested and factored scales, 4 to 16 bits, a random rounding."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def parameters(name: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Of the shapes that the rule serves."""
    generator = torch.Generator().manual_seed(1)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return [p for p in made if REGISTRY.get(name).refusal(p) is None]


def twin_of(name: str) -> Any:
    twin = getattr(torch.optim, REGISTRY.get(name).__name__, None)
    if twin is None:
        pytest.skip(f"torch has no {REGISTRY.get(name).__name__}: its own test holds it to its paper or a peer")
    return twin


def all_kept(kind: type[LowBitOptimizer]) -> dict[str, Any]:
    """Options under which a rule keeps every state that it may keep in few bits."""
    return {"momentum": 0.9} if "momentum" in kind.options_type.__dataclass_fields__ else {}


def train(optimizer: torch.optim.Optimizer, first: int, last: int, after: Callable[[], None] = lambda: None) -> None:
    """Steps ``first .. last - 1``, each with gradients of its own; every third leaves a parameter out."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator) * 10.0 ** (i - 2)
            p.grad = None if step % 3 == 2 and i == 0 else gradient.to(p.dtype)
        optimizer.step()
        after()


def build(name: str, params: Any, **options: Any) -> LowBitOptimizer:
    made: LowBitOptimizer = REGISTRY.get(name)(params, **({"min_size": 30} | options))
    return made


def leaves(x: Any, path: str = "") -> dict[str, Any]:
    """Every tensor, number and text of a state dict by its path."""
    if isinstance(x, dict):
        items: Any = x.items()
    elif isinstance(x, list | tuple):
        items = enumerate(x)
    else:
        return {path: x}
    return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}").items()}


def same(a: Any, b: Any) -> None:
    one, other = leaves(a), leaves(b)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


MORE: dict[str, list[dict[str, Any]]] = {
    "adam": [{"weight_decay": 0.1}],
    "sgd": [
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
    ],
    "rmsprop": [{"momentum": 0.9, "weight_decay": 0.1}, {"centered": True}, {"centered": True, "momentum": 0.5}],
    "adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}],
    "adafactor": [{"eps": (1e-8, 1e-2), "d": 2.0, "beta2_decay": -0.5, "weight_decay": 0.1}],
    "muon": [{"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
}
"""Options that change a rule's course."""


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in NAMES for options in ({}, *MORE.get(name, ()))]
)
def test_equals_its_twin(name: str, options: dict[str, Any]) -> None:
    """Bit for bit, over groups and a schedule, and either continues what the other saved."""
    part, twin = REGISTRY.get(name), twin_of(name)
    ours, theirs = (parameters(name) for _ in range(2))
    if name == "adafactor":  # torch's divides by the number of elements
        ours, theirs = ([p for p in params if p.numel()] for params in (ours, theirs))
    made = []
    more: dict[str, Any] = {} if name == "muon" else {"foreach": False}
    for kind, params, how in ((part, ours, {"state": None}), (twin, theirs, more)):
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "weight_decay": 0.0}]
        optimizer = kind(groups, **options, **how)
        train(optimizer, 0, 5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        train(optimizer, 5, 12, schedule.step)
        made.append(optimizer)
    one, other = made
    same([p.data for p in ours], [p.data for p in theirs])
    states = one.state_dict()["state"]
    for entry in states.values() if not part.counts else ():
        del entry["step"]  # torch's keep none
    same({k: entry for k, entry in states.items() if entry}, other.state_dict()["state"])
    assert one.param_groups[1]["lr"] == other.param_groups[1]["lr"] == pytest.approx(0.3 * 0.7**7)

    crossed = copy.deepcopy(one.state_dict()), copy.deepcopy(other.state_dict())
    other.load_state_dict(crossed[0])
    one.load_state_dict(crossed[1])
    for optimizer in made:
        train(optimizer, 12, 15)
    same([p.data for p in ours], [p.data for p in theirs])


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_twins(name: str) -> None:
    part, twin = REGISTRY.get(name), twin_of(name)
    ours, theirs = part(parameters(name)).defaults, twin(parameters(name)).defaults
    assert {k: v for k, v in ours.items() if k in theirs} == {k: theirs[k] for k in theirs.keys() & ours.keys()}
    assert set(ours) - set(theirs) == {"state", "min_size", "seed", "weights", "keep_sign", "is_paged"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", NAMES)
def test_resume_changes_nothing(name: str, line: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through torch.save without pickles, and through safetensors: codes stay codes, float32 stays float32."""
    whole, options = parameters(name, dtype), all_kept(REGISTRY.get(name))
    optimizer = build(name, whole, state=line, seed=3, **options)
    before = torch.get_rng_state()
    train(optimizer, 0, 3)
    saved, values = optimizer.state_dict(), [p.detach().clone() for p in whole]

    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    by_torch = torch.load(file, weights_only=True)
    tensors, metadata = flatten(saved)
    safetensors.torch.save_file(tensors, tmp_path / "state.safetensors", metadata)
    with safetensors.safe_open(tmp_path / "state.safetensors", "pt") as opened:
        by_safetensors = unflatten({key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata())  # noqa: SIM118
    same(by_torch, saved)
    same(by_safetensors, saved)

    train(optimizer, 3, 7)
    for loaded in (by_torch, by_safetensors):
        params = [nn.Parameter(x.clone()) for x in values]
        resumed = build(name, params, state=line, lr=123.0, seed=99, **options)  # the file's options count
        resumed.load_state_dict(loaded)
        same(resumed.state_dict()["state"], loaded["state"])
        train(resumed, 3, 7)
        same([p.data for p in params], [p.data for p in whole])
        same(resumed.state_dict(), optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), before)

    kept = leaves(saved["state"])
    codes = [x for key, x in kept.items() if key.endswith("/codes")]
    assert codes and all(x.dtype == torch.uint8 for x in codes)
    assert all(
        x.dtype == torch.float32 for key, x in kept.items() if key.endswith(("/step", *REGISTRY.get(name).states))
    )


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_state_can_be(name: str, line: str) -> None:
    """Finite under any line; where no gradient has been, parameter and states stay exactly what they were."""
    p = nn.Parameter(torch.ones(30, 100))
    optimizer = build(name, [p], state=line, weight_decay=0.0, lr=0.1, **all_kept(REGISTRY.get(name)))
    for step in range(5):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * 1e-3
        p.grad[:, 64:] = 0
        p.grad[11] = 0
        optimizer.step()
    quiet = torch.zeros(30, 100, dtype=torch.bool)
    quiet[:, 64:] = True
    quiet[11] = True
    assert p.isfinite().all() and (p[~quiet] != 1).float().mean() > 0.99
    for kept in optimizer.state[p].values():
        assert isinstance(kept, Tensor) or kept.dequantize().isfinite().all()
    if line.startswith("state8") or line in ("int8 flat=100", "float8_e4m3fn channel", "dynamic8 rank1"):
        assert (p[quiet] == 1).all()


def flat(bits: int, block: int) -> Callable[[tuple[int, ...]], int]:
    """Bytes of codes, and of a float32 for each block of the flattened tensor."""
    return lambda shape: -(-bits * math.prod(shape) // 8) + 4 * -(-math.prod(shape) // block)


def rank1(shape: tuple[int, ...]) -> int:
    """Bytes of 4-bit codes, and of a float32 for each row and each column, or for each 128 elements of a vector."""
    return -(-math.prod(shape) // 2) + 4 * sum(shape) if len(shape) > 1 else flat(4, 128)(shape)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("line", "signed", "nonnegative"),
    [
        ("state8", flat(8, 256), flat(8, 256)),
        ("state8 flat=64", flat(8, 64), flat(8, 64)),
        ("state4", flat(4, 128), rank1),
        ("float6_e2m3fn tensor", flat(6, 10**9), flat(6, 10**9)),
    ],
    ids=["state8", "flat=64", "state4", "6 bits"],
)
def test_bytes_as_foretold(name: str, line: str, signed: Any, nonnegative: Any) -> None:
    """Codes and scales by the sheets' formulas; float32 below ``min_size`` elements, quantized at it."""
    params = parameters(name)
    optimizer = build(name, params, state=line, min_size=105, **all_kept(REGISTRY.get(name)))
    assert optimizer.state_bytes() == dict.fromkeys((*optimizer.states, "step"), 0)
    train(optimizer, 0, 3)
    assert 105 in [p.numel() for p in params]
    for state, kind in optimizer.states.items():
        shapes = [kept[state] for p in params if state in (kept := optimizer.shapes(p))]
        quantized = signed if kind == "signed" else nonnegative
        wide = optimizer.param_groups[0]["state"][state] is None
        assert wide == (state in optimizer.factors)
        foretold = sum(quantized(s) if math.prod(s) >= 105 and not wide else 4 * math.prod(s) for s in shapes)
        assert optimizer.state_bytes()[state] == foretold
    assert optimizer.state_bytes()["step"] == 4 * len(params)
    tensors, _ = flatten(optimizer.state_dict())
    assert sum(optimizer.state_bytes().values()) == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_counted_under_any_default(name: str, fused: bool | None) -> None:
    """bfloat16 has no 257: a count in torch's default dtype would stay at 256, and bias corrections with it."""
    params, usual = parameters(name), torch.get_default_dtype()
    optimizer = build(name, params, fused=fused)
    torch.set_default_dtype(torch.bfloat16)
    try:
        train(optimizer, 0, 1)
        for entry in optimizer.state.values():
            entry["step"].fill_(256)
        train(optimizer, 1, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, 3, 4)
    finally:
        torch.set_default_dtype(usual)
    assert [(entry["step"].dtype, int(entry["step"])) for entry in optimizer.state.values()] == [
        (torch.float32, 258)
    ] * len(params)


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_is_pure(name: str) -> None:
    """Nothing that comes in changes, and nothing that comes out shares its memory."""
    part = REGISTRY.get(name)
    more = all_kept(part)
    options, seed = part.options_type(**more), torch.Generator().manual_seed(0)
    for step in (1, 2):
        p, grad = (torch.randn(6, 5, generator=seed) for _ in range(2))
        shapes = build(name, [nn.Parameter(p)], **more).shapes(p)
        states = {state: torch.rand(shape, generator=seed) for state, shape in shapes.items()}
        before = copy.deepcopy((p, grad, states))
        moved, new = part.update(p, grad, states, step, options)
        same((p, grad, states), before)
        pointers = [x.data_ptr() for x in (p, grad, *states.values(), moved, *new.values())]
        assert all(a != b for a, b in pairwise(sorted(pointers)))
        assert new.keys() == shapes.keys() and all(x.dtype == torch.float32 for x in (moved, *new.values()))
        assert {state: tuple(x.shape) for state, x in new.items()} == shapes
        again, _ = part.update(p, grad, states, step, options)
        assert torch.equal(moved, again) and not torch.equal(moved, p)
