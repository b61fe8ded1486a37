"""A kernel's step is the rule's, bit for bit: parameters, codes, scales, residuals and what was set aside.

The compiled library on the CPU; Triton's kernels on a GPU, elsewhere in its interpreter, whose square roots are IEEE's
as a GPU's are: torch's on a CPU may be MKL's, and are replaced there.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.contracts.interpreted import DEVICE, needed
from torch import Tensor, nn

import nybble.optim
from nybble.kernels import _steps
from nybble.kernels._library import library
from nybble.optim import REGISTRY, LowBitOptimizer, NonFiniteWarning, _forms, _fused, flatten

pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),  # numpy, interpreting
    pytest.mark.filterwarnings("ignore::nybble.optim.NonFiniteWarning"),
]
SHAPES = ((6, 256), (300,), (5, 7), (20, 130), (3, 50), (2, 384))
"""Whole tiles, blocks that end early, below ``min_size``, matrices whose rows are no whole blocks."""
LINES = ("state8", "state4", "state-fp8", "state8-companded", "udynamic8 flat=64 scale_format=float32", None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
Kernel = Callable[[], None]


@pytest.fixture(params=["library", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where parameters lie, with that kernel for them."""
    torch.set_num_threads(1)
    _fused.find_kernel(CPU)
    if request.param == "library":
        if library() is None:
            pytest.skip("no C++ compiler")
        yield "cpu"
        _asked_again()
        return
    pytest.importorskip("triton", reason="Triton is optional")
    from nybble.kernels import gpu_optim

    if DEVICE == "cpu":
        root = torch.Tensor.sqrt
        monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))
        monkeypatch.setitem(_fused.find_kernel.kernels, "cpu", gpu_optim.kernel_of)
    _asked_again()
    yield DEVICE
    _asked_again()


def _asked_again() -> None:
    """How torch rounds, which a test may have changed."""
    for found in (_forms.forms, _steps.refusal):
        found.cache_clear()


def build(rule: str, device: str, dtype: torch.dtype, fused: bool, **options: Any) -> LowBitOptimizer:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    made: LowBitOptimizer = REGISTRY.get(rule)(params, fused=None if fused else False, **({"min_size": 40} | options))
    return made


def train(optimizer: LowBitOptimizer, first: int, last: int, *, finite: bool = True) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for k, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator) * 10.0 ** (k - 3)
            gradient.view(-1)[:3] = 0
            if not finite and step:
                gradient.view(-1)[5], gradient.view(-1)[34] = torch.nan, torch.inf
            p.grad = None if step == 2 and k == 1 else gradient.to(p.device, p.dtype)
        optimizer.step()
    return [p.data for p in params]


def same(one: LowBitOptimizer, other: LowBitOptimizer) -> None:
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p.data.float().nan_to_num(7.0), q.data.float().nan_to_num(7.0))
    (states, rest), (others, more) = (flatten(x.state_dict()) for x in (one, other))
    assert rest == more and states.keys() == others.keys()
    for name, x in states.items():
        assert x.dtype == others[name].dtype and torch.equal(x.nan_to_num(7.0), others[name].nan_to_num(7.0)), name
    assert one.set_aside() == other.set_aside()


def both(rule: str, device: str, dtype: torch.dtype, *, finite: bool = False, steps: int = 3, **options: Any) -> None:
    """Trained by the kernel and by the rule."""
    one, other = (build(rule, device, dtype, fused, **options) for fused in (True, False))
    assert [row["reason"] for row in one.kernels() if row["kernel"] is None] == []
    assert {row["reason"] for row in other.kernels()} == {"fused=False"}
    for optimizer in (one, other):
        train(optimizer, 0, steps, finite=finite)
    same(one, other)


@pytest.mark.parametrize(
    ("rule", "at", "line"), [(rule, i + j, line) for i, rule in enumerate(_steps.RULES) for j, line in enumerate(LINES)]
)
@needed
def test_every_rule_over_every_state(rule: str, at: int, line: str | None, device: str) -> None:
    """In every dtype by the library; Triton's interpreter is slow, and has one of them for each."""
    own = REGISTRY.get(rule).states
    state: Any = line
    if line is not None and line.startswith("u"):  # no negative values
        state = {name: line if kind == "nonnegative" else "state8" for name, kind in own.items()}
    more: dict[str, Any] = {"momentum": 0.9} if rule == "sgd" else {}
    for dtype in DTYPES if device == "cpu" and "cpu" in str(_fused.find_kernel(CPU)) else DTYPES[at % 3 :][:1]:
        both(rule, device, dtype, state=state, weight_decay=0.1 * (at % 2), **more)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adamw", {"weights": "stochastic", "seed": 3}),
        ("adamw", {"weights": "residual8", "state": "state4"}),
        ("adam", {"weights": "residual8", "state": "state4", "weight_decay": 0.1}),
        ("adamw", {"state": {"exp_avg": "state8 flat=4096", "exp_avg_sq": None}}),
        (
            "adamw",
            {
                "state": {
                    "exp_avg": "nf4 flat=32 scale_format=float32",
                    "exp_avg_sq": "linear4 flat=128 scale_format=float32",
                }
            },
        ),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "dampening": 0.3}),
        ("sgd", {}),
        ("rmsprop", {"momentum": 0.9, "weight_decay": 0.1}),
        ("adagrad", {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    ],
)
@needed
def test_options(rule: str, options: dict[str, Any], device: str) -> None:
    both(rule, device, torch.bfloat16, **options)


@pytest.mark.parametrize("weights", ["stochastic", "residual8"])
@needed
def test_every_bfloat16(weights: str, device: str) -> None:
    """Infinities, NaNs and the largest numbers too; a residual of any size beside each; every third, interpreted."""
    every = 3 if device == "cpu" and "gpu" in str(_fused.find_kernel(CPU)) else 1
    pair = []
    for fused in (True, False):
        p = nn.Parameter(torch.arange(-32768, 32768, every).to(torch.int16).view(torch.bfloat16).to(device))
        optimizer: Any = REGISTRY.get("sgd")([p], state=None, weights=weights, fused=None if fused else False, lr=1.0)
        for step in range(2):
            draw = torch.Generator().manual_seed(step)
            p.grad = (torch.randn(p.shape, generator=draw) * p.detach().cpu().float() * 2.0**-8).bfloat16().to(device)
            optimizer.step()
            if weights == "residual8" and not step:
                made = torch.arange(p.numel()).remainder(251).sub(125).to(device, torch.int8)
                optimizer.state[p]["residual"].copy_(made)
        pair.append(optimizer)
    assert [bool(x.kernels()[0]["kernel"]) for x in pair] == [True, False]
    (one,), (other,) = (x.param_groups[0]["params"] for x in pair)
    finite = ~other.isnan()
    assert torch.equal(one[finite], other[finite]) and one[~finite].isnan().all()
    for name, x in flatten(pair[0].state_dict())[0].items():
        assert torch.equal(x, flatten(pair[1].state_dict())[0][name])


@pytest.mark.parametrize("form", [1, 2])
@needed
def test_a_division_by_a_number_as_each_torch_does_it(form: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is a product with a reciprocal, which torch 2.11 finds in float64; roots of these steps differ."""
    divided, divided_in_place = torch.Tensor.__truediv__, torch.Tensor.div_

    def by(number: float) -> Tensor:
        one = torch.ones((), dtype=torch.float64 if form == 2 else torch.float32)
        return divided(one, torch.full_like(one, number)).float()

    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda x, y: x * by(y) if type(y) is float else divided(x, y))
    monkeypatch.setattr(
        torch.Tensor, "div_", lambda x, y: x.mul_(by(y)) if type(y) is float else divided_in_place(x, y)
    )
    _asked_again()
    forms = _forms.forms(torch.device(device))
    assert forms is not None and forms.div == form
    both("adamw", device, torch.float32, state=None)


@needed
def test_tiny_and_huge_numbers(device: str) -> None:
    """Scales whose reciprocal overflows, quotients next to a threshold, moments that underflow."""
    for line in ("state8", "state4"):
        one, other = (build("adamw", device, torch.float32, fused, state=line, eps=1e-30) for fused in (True, False))
        for optimizer in (one, other):
            for size in (1e-22, 1e-41, 1e18):
                for k, p in enumerate(optimizer.param_groups[0]["params"]):
                    grid = torch.arange(p.numel()).remainder(64).view(p.shape) / 32
                    p.grad = (grid * size * 4.0**k).to(p.device)
                optimizer.step()
        same(one, other)


@needed
def test_what_changes_between_steps(device: str) -> None:
    """Gradients elsewhere or missing, parameters and states in new memory, a schedule, a group that comes later."""
    pair = [build("adamw", device, torch.float32, fused, state="state4") for fused in (True, False)]
    for optimizer in pair:
        train(optimizer, 0, 3)
        optimizer.param_groups[0]["lr"] = 0.1
        for p in optimizer.param_groups[0]["params"]:
            p.data = p.data.clone()
        train(optimizer, 3, 4)
        optimizer.load_state_dict(optimizer.state_dict())
        gc.collect()
        train(optimizer, 4, 5)
        optimizer.param_groups[0]["params"][0].data = optimizer.param_groups[0]["params"][0].data.bfloat16()
        p = optimizer.param_groups[0]["params"][3]
        p.grad = torch.ones(p.shape[::-1], device=device).T  # the rule has to take this one
        optimizer.step()
        added = nn.Parameter(torch.ones(300, device=device))
        optimizer.add_param_group({"params": [added], "lr": 0.5, "weight_decay": 0.0})
        added.grad = torch.arange(300.0, device=device)
        train(optimizer, 6, 8)
    same(*pair)
    assert torch.equal(*(optimizer.param_groups[1]["params"][0].data for optimizer in pair))
    assert [int(state["step"]) for state in pair[0].state.values()] == [8, 7, 8, 8, 8, 8, 2]


def test_random_numbers_are_drawn_for_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all parameters together would be twice as large as these are."""
    if library() is None:
        pytest.skip("no C++ compiler")
    sizes: list[int] = []
    kernel = _fused.find_kernel(CPU)
    assert kernel is not None
    run = kernel.run

    def counted(_: Any, launch: _fused.Launch) -> None:
        sizes.append(sum(draw.numel() for draw in launch.draws or ()))
        run(launch)

    monkeypatch.setattr(_fused, "_DRAWN", 2000)
    monkeypatch.setattr(type(kernel), "run", counted)
    pair = [build("adamw", "cpu", torch.bfloat16, fused, weights="stochastic") for fused in (True, False)]
    for optimizer in pair:
        train(optimizer, 0, 1)
    same(*pair)
    assert sorted(sizes) == [5 * 7, 300, 3 * 50 + 2 * 384, 6 * 256, 20 * 130]


@needed
def test_groups_that_keep_other_states_from_now_on(device: str) -> None:
    """A momentum that goes and comes again, weights rounded otherwise, other quantizers, or none for a while."""
    changes: list[dict[str, Any]] = [{"momentum": 0.0}, {"momentum": 0.5}, {"weights": "residual8"}]
    changes += [{"weights": "nearest"}, {"min_size": 0}, {"state": "state4"}, {"min_size": 1 << 20}]
    changes += [{"min_size": 0, "keep_sign": True}]
    pair = [build("sgd", device, torch.bfloat16, fused, momentum=0.9, min_size=1000) for fused in (True, False)]
    for optimizer in pair:
        train(optimizer, 0, 2)
        for step, change in enumerate(changes):
            optimizer.param_groups[0].update(change)
            train(optimizer, 3 + step, 4 + step)
    same(*pair)


@needed
def test_a_saved_state_is_not_written_into(device: str) -> None:
    """Neither by the one that was loaded from it, nor torch's copies of the other."""
    first = build("adamw", device, torch.bfloat16, True, weights="residual8")
    train(first, 0, 2)
    saved = first.state_dict()
    kept = {name: x.clone() for name, x in flatten(saved)[0].items()}
    second = build("adamw", device, torch.bfloat16, True, weights="residual8")
    second.load_state_dict(saved)
    train(second, 2, 4)
    assert all(torch.equal(x, kept[name]) for name, x in flatten(saved)[0].items())


@needed
def test_autograd_sees_a_step(device: str) -> None:
    """A backward that still needs the old numbers says so, as behind torch's optimizers."""
    optimizer = build("adamw", device, torch.float32, True)
    p = optimizer.param_groups[0]["params"][0]
    loss = p.square().sum()
    train(optimizer, 0, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needed
def test_gradients_that_are_not_their_memory(device: str) -> None:
    """Of which torch keeps that they are negative, or nothing but that they are 0."""
    pair = [build("adamw", device, torch.float32, fused) for fused in (True, False)]
    for optimizer in pair:
        train(optimizer, 0, 1)
        one, other, *_ = optimizer.param_groups[0]["params"]
        one.grad = torch._neg_view(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)).to(device))
        other.grad = torch._efficientzerotensor(other.shape, device=device)
        optimizer.step()
    same(*pair)


@needed
def test_a_residual_elsewhere_is_brought(device: str) -> None:
    """As after a parameter was moved; here it is not one run of memory."""
    pair = [build("sgd", device, torch.bfloat16, fused, weights="residual8") for fused in (True, False)]
    for optimizer in pair:
        train(optimizer, 0, 1)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state["residual"] = state["residual"].T.contiguous().T
        train(optimizer, 1, 3)
    same(*pair)


@pytest.mark.parametrize("default", ["meta", "float16"])
@pytest.mark.parametrize("state", LINES[:2])
def test_whatever_torchs_defaults_are(default: str, state: str) -> None:
    """Room for factors, and the questions how torch rounds, are float32 on the CPU."""
    _fused.find_kernel(CPU)
    _forms.forms.cache_clear()
    plain, usual = build("adamw", "cpu", torch.float32, True, state=state), torch.get_default_dtype()
    odd = build("adamw", "cpu", torch.float32, True, state=state)
    train(plain, 0, 1)
    gradients = [p.grad for p in plain.param_groups[0]["params"]]
    _forms.forms.cache_clear()
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(torch.float16)
        for step in range(3):
            for p, gradient in zip(odd.param_groups[0]["params"], gradients, strict=True):
                p.grad = gradient.clone() * (step + 1)
            odd.step()
        assert [row["reason"] for row in odd.kernels() if row["kernel"] is None] == []
        if state == "state4" and library() is not None:
            assert [h["table"].fresh.dtype for h in odd._fused().held.values()].count(torch.float32)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(usual)


def test_a_copy_has_the_same_choice_of_kernels() -> None:
    chosen = build("adamw", "cpu", torch.float32, False)
    assert {row["reason"] for row in copy.deepcopy(chosen).kernels()} == {"fused=False"}


def test_who_steps_what_and_why() -> None:
    """Every reason names what stands in the way; the rule steps it."""
    _fused.find_kernel(CPU)

    def reasons(rule: str, p: Tensor | None = None, **options: Any) -> set[str]:
        params = [nn.Parameter(torch.zeros(64, 64) if p is None else p)]
        return {row["reason"] for row in REGISTRY.get(rule)(params, min_size=1, **options).kernels()}

    assert reasons("adamw") == {""}
    assert reasons("adamw", fused=False) == {"fused=False"}
    assert reasons("muon") == {"the rule muon has none"}
    assert reasons("adamw", keep_sign=True) == {"keep_sign"}
    assert reasons("adamw", betas=(0.5, 0.9)) == {"beta1 of at most 1/2, where torch's lerp takes another form"}
    assert "rounding=stochastic" in reasons("adamw", state="state8 rounding=stochastic").pop()
    assert "blocks of 100" in reasons("adamw", state="int8 flat=100 scale_format=float32").pop()
    assert "scales of blocks" in reasons("adamw", state="int8 flat=64").pop().replace("other than float32 of", "of")
    assert "even number" in reasons("adamw", torch.zeros(64, 63), state="state4").pop()
    assert reasons("adamw", torch.zeros(64, 64).T) == {"a parameter that is not one run of memory"}
    with pytest.raises(AttributeError):
        nybble.optim.NoSuchRule  # noqa: B018
    assert issubclass(NonFiniteWarning, UserWarning)
