"""Learned parts: begin at round-to-nearest, settle to what eval mode computes, carry gradients, store and restore."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError, UsageError
from nybble.learned import ACTIVATIONS, REGISTRY, WEIGHTS, Learned, Menu, Part, make_part
from nybble.qtensor import QTensor, QuantParams
from nybble.quantizer import Quantizer

ROWS, COLUMNS = 12, 64
LINES: dict[str, tuple[str, ...]] = {
    WEIGHTS: (
        "int4 channel", "int4 group=8 symmetric=false", "int3 group=24 pad=true scale=mse", "int8 tensor",
        "int4-ct group=16", "int4 channel symmetric=false rounding=nearest-even-code", "float4_e2m1fn group=8",
        "float4_e2m1fn channel scale_format=float16", "float8_e4m3fn block=4x16 reciprocal=true", "nvfp4", "mxfp4",
        "nf4 flat=40", "nf4 channel rounding=native", "float4_e2m1fn group=16 scale=minmax(offset=true)",
        "uint4 group=16 symmetric=false", "ternary channel scale=mean", "binary group=8 scale=mean",
        "float4_e2m1fn channel rounding=half-away", "int4 rank1", "float4_e2m1fn shifted", "nf4-bnb-dq",
        "float16_e8m7 tensor scale=one", "uint8 scale=minmax(offset=true)",
    ),
    ACTIVATIONS: (
        "int8 token", "int8 tensor static", "uint4 tensor static symmetric=false", "float8_e4m3fn token", "mxfp4",
        "float4_e2m1fn tensor static", "float4_e2m1fn shifted static", "int8 plane", "nvfp4",
        "int8 tensor static scale=learned", "binary tensor static scale=elastic",
        "uternary tensor static scale=elastic", "uint2 tensor static", "int3_full tensor static scale=elastic",
    ),
}  # fmt: skip
#: What a part can't learn; everything else of LINES it must.
REFUSED: dict[str, dict[str, set[str]]] = {
    "ste": {},
    "menu": {},
    "binarization-scales": {},
    "elastic": {
        ACTIVATIONS: {
            "int8 token", "float8_e4m3fn token", "mxfp4", "int8 plane", "nvfp4", "float4_e2m1fn shifted static"
        },
    },
    "thresholds": {
        ACTIVATIONS: {
            line
            for line in LINES[ACTIVATIONS]
            if not line.startswith(("uternary", "uint2", "int3_full"))  # more levels, uneven ones, or a zero point
        },
    },
    "statistics": {WEIGHTS: {"int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one"}},
    "lsq": {
        WEIGHTS: {"int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one"},
        ACTIVATIONS: {
            "int8 token", "float8_e4m3fn token", "mxfp4", "int8 plane", "nvfp4", "float4_e2m1fn shifted static"
        },
    },
    "adaround": {},
    "flexround": {},
    "sign-round": {WEIGHTS: {"int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one"}},
    "block-ap": {WEIGHTS: {"int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one"}},
    "lora-rounding": {WEIGHTS: {"int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one"}},
    "frozen-codes": {WEIGHTS: {"int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one"}},
    "outer-scales": {WEIGHTS: {line for line in LINES[WEIGHTS] if line not in ("nvfp4", "nf4-bnb-dq")}},
    "pruned": {WEIGHTS: {line for line in LINES[WEIGHTS] if line != "ternary channel scale=mean"}},
    "pseudo-noise": {WEIGHTS: {line for line in LINES[WEIGHTS] if line != "uint8 scale=minmax(offset=true)"}},
    "vector-candidates": {WEIGHTS: set(LINES[WEIGHTS])},
    "clip": {
        WEIGHTS: {
            "int3 group=24 pad=true scale=mse", "mxfp4", "ternary channel scale=mean", "binary group=8 scale=mean",
            "int4 rank1", "float4_e2m1fn shifted", "float16_e8m7 tensor scale=one",
        },
    },
}  # fmt: skip
#: Those that begin elsewhere, as their papers do.
ELSEWHERE = {"pruned"}
#: Options with which a part begins at round-to-nearest, where its paper's own begin elsewhere.
EXACT: dict[str, dict[str, Any]] = {"clip": {"start": 30.0}}


def tensor(side: str, seed: int = 0) -> Tensor:
    """A weight with a heavy tail, or activations of two images' worth of tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, COLUMNS) if side == WEIGHTS else (2, 6, COLUMNS)
    x = torch.randn(shape, generator=generator)
    return x * (1 + 3 * (torch.rand(shape, generator=generator) > 0.97))


def made(name: str, line: str, side: str, **options: Any) -> tuple[Learned, Tensor]:
    x = tensor(side)
    return make_part(name, options).make(Quantizer(line), x, side=side), x


def cases() -> list[tuple[str, str, str]]:
    return [
        (name, side, line)
        for name, part in REGISTRY.all().items()
        for side in part.sides
        for line in LINES[side]
        if line not in REFUSED[name].get(side, ())
    ]


#: Lines whose parameters are stored differently, one of each: for what depends on nothing else.
STORED = frozenset((
    "int4 channel", "int4 group=8 symmetric=false", "nvfp4", "float4_e2m1fn group=16 scale=minmax(offset=true)",
    "int4 rank1", "nf4-bnb-dq", "float16_e8m7 tensor scale=one", "int8 token", "float4_e2m1fn shifted static",
    "int8 tensor static scale=learned",
))  # fmt: skip


def drawn(learned: Learned, x: Tensor) -> Tensor:
    """Forward with the same noise at every call."""
    torch.manual_seed(5)
    found: Tensor = learned(x)
    return found


def few() -> list[tuple[str, str, str]]:
    return [case for case in cases() if case[2] in STORED]


def settled(learned: Learned, x: Tensor) -> Tensor:
    """What the settled parameters give, by the stored tensor's own arithmetic."""
    found = learned.settle(x)
    if isinstance(found, QTensor):
        return found.dequantize(x.dtype)
    assert isinstance(found, QuantParams)
    return learned.quantizer.quantize(x, found).dequantize(x.dtype)


def moved(learned: Learned, x: Tensor, steps: int = 3) -> None:
    """Some steps of training, from whatever x is to something else."""
    target = x.roll(1, -1) * 0.7
    parameters = [p for group in learned.groups().values() for p in group]
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x, *parameters], lr=0.02)
    learned.train()
    for step in range(steps):
        optimizer.zero_grad()
        ((learned(x) - target).square().mean() + learned.penalty(step / steps)).backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "side", "line"), few())
def test_cast_is_what_is_cast_afterwards(name: str, side: str, line: str) -> None:
    """Whether or not a part does both at once: values and gradients."""
    learned, x = made(name, line, side)
    learned.train()
    parameters = [p for group in learned.groups().values() for p in group if p.requires_grad]
    found = []
    for at_once in (False, True):
        torch.manual_seed(5)
        own = x.clone().requires_grad_()
        y = learned(own, torch.bfloat16) if at_once else learned(own).to(torch.bfloat16)
        gradients = torch.autograd.grad(y.float().square().sum(), [own, *parameters], allow_unused=True)
        found.append((y.detach(), *gradients))
    for first, second in zip(*found, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)
    assert found[0][0].dtype == found[1][0].dtype == learned.eval()(x, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(learned(x, torch.bfloat16), learned(x).to(torch.bfloat16))


@pytest.mark.parametrize(("name", "side", "line"), [case for case in cases() if case[0] not in ELSEWHERE])
def test_begins_at_round_to_nearest(name: str, side: str, line: str) -> None:
    learned, x = made(name, line, side, **EXACT.get(name, {}))
    nearest = Quantizer(line).fake_quantize(x)
    assert torch.equal(learned.eval()(x), nearest)


@pytest.mark.parametrize(("name", "side", "line"), cases())
def test_begins_at_a_start(name: str, side: str, line: str) -> None:
    quantizer, x = Quantizer(line), tensor(side)
    start, part = quantizer.quantize(0.8 * x), make_part(name, {})
    starts = (start.params,) if side == ACTIVATIONS else (start, start.params)
    for given in starts:
        if not part.takes_start:
            with pytest.raises(SchemeError, match=f"{name}.*takes no start"):
                part.make(quantizer, x, given, side)
            continue
        learned = part.make(quantizer, x, given, side).eval()
        assert torch.equal(learned(x), quantizer.fake_quantize(x, start.params))
    if part.takes_start and side == WEIGHTS:  # what a solver decided, nearest or not
        assert torch.equal(
            part.make(quantizer, start.dequantize(), start).eval()(start.dequantize()), start.dequantize()
        )


@pytest.mark.parametrize(
    ("name", "side", "line", "dtype"),
    [(*case, torch.float32) for case in cases()] + [(*case, torch.bfloat16) for case in few()],
)
def test_eval_is_what_is_stored(name: str, side: str, line: str, dtype: torch.dtype) -> None:
    learned, x = made(name, line, side)
    moved(learned, x)
    learned.eval()
    for other in (x.to(dtype), (0.6 * x.roll(3, 0)).to(dtype), torch.zeros_like(x, dtype=dtype)):
        found = learned(other)
        assert found.dtype == dtype
        assert torch.equal(found, settled(learned, other))


@pytest.mark.parametrize(("name", "side", "line"), [case for case in cases() if case[1] == WEIGHTS])
def test_rows_that_are_looked_up(name: str, side: str, line: str) -> None:
    """They are those of the whole table, in values and gradients, rounded alone or not."""
    learned, x = made(name, line, side)
    moved(learned, x)
    ids = torch.tensor([[2, 0, 2], [ROWS - 1, 5, 0]])
    assert torch.equal(learned.eval().lookup(x, ids), learned(x)[ids])
    x.requires_grad_()
    torch.manual_seed(5)
    found, whole = learned.train().lookup(x, ids, 2), drawn(learned, x)[ids]
    assert torch.equal(found, whole)
    if found.requires_grad:
        weight = torch.linspace(-1, 1, found.numel()).view_as(found)
        hidden = torch.where((ids == 2)[..., None], 0.0, weight)  # the row of padding gets none
        gradients = [
            torch.autograd.grad((w * y).sum(), x, allow_unused=True)[0] for w, y in ((weight, found), (hidden, whole))
        ]
        assert (gradients[0] is None) == (gradients[1] is None)
        if gradients[0] is not None:
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("name", "side", "line"), cases())
def test_gradients(name: str, side: str, line: str) -> None:
    """Finite everywhere, zeros included; nonzero in every group, and in x unless the part fixes it."""
    learned, x = made(name, line, side)
    x[:, 0] = 0
    x.requires_grad_()
    parameters = learned.groups()
    assert set(parameters) == set(REGISTRY.get(name).groups)
    listed = [id(p) for found in parameters.values() for p in found]
    assert sorted(listed) == sorted(id(p) for p in learned.parameters())
    weight = torch.linspace(-1, 2, x.numel()).reshape(x.shape)  # whose sum is not 0, for what all share
    (weight * learned.train()(x)).sum().backward()
    for found in parameters.values():
        gradients = [p.grad for p in found if p.grad is not None]
        assert len(gradients) == len(found) and all(g.isfinite().all() for g in gradients)
        assert any(g.count_nonzero() > 0 for g in gradients)
    if REGISTRY.get(name).fixes_x:
        assert x.grad is None or not x.grad.count_nonzero()
    else:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.count_nonzero() > 0.5 * x.numel()


@pytest.mark.parametrize(("name", "side", "line"), cases())
def test_state_goes_on_exactly(name: str, side: str, line: str) -> None:
    learned, x = made(name, line, side)
    moved(learned, x)
    stored = {key: value.clone() for key, value in learned.state_dict().items()}
    restored, _ = made(name, line, side)
    restored.load_state_dict(stored)
    for one, other in ((learned.train(), restored.train()), (learned.eval(), restored.eval())):
        assert torch.equal(drawn(one, x), drawn(other, x))
    assert torch.equal(learned.penalty(0.7), restored.penalty(0.7))
    for each in (learned, restored):
        torch.manual_seed(5)
        moved(each, x)
    assert torch.equal(learned.eval()(x), restored.eval()(x))


@pytest.mark.parametrize(("name", "side", "line"), few())
def test_stays_float32(name: str, side: str, line: str) -> None:
    learned, _ = made(name, line, side)
    before = {key: value.clone() for key, value in learned.state_dict().items()}
    learned.to(torch.bfloat16)
    for key, value in learned.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])


@pytest.mark.parametrize("name", REGISTRY.names())
def test_refusals(name: str) -> None:
    part: Part = make_part(name, {})
    for side in LINES:
        if side not in part.sides:
            with pytest.raises(SchemeError, match=f"{name} learns .*not {side}"):
                part.check(Quantizer(LINES[side][0]), side)
            continue
        for line in LINES[side]:
            if line in REFUSED[name].get(side, ()):
                with pytest.raises(SchemeError, match=name) as caught:
                    part.make(Quantizer(line), tensor(side), side=side)
                assert Quantizer(line).format.name in str(caught.value)
            else:
                part.check(Quantizer(line), side)
    side = part.sides[0]
    with pytest.raises(SchemeError, match=f"{name}.*stochastic"):
        part.check(Quantizer("int4 channel rounding=stochastic"), side)


@pytest.mark.parametrize("name", [name for name, part in REGISTRY.all().items() if WEIGHTS in part.sides])
def test_formats_of_float32s_whole_range(name: str) -> None:
    """2^127 under a scale of 2^-127 has no gradient in float32; where nothing is scaled (LINES) there is one."""
    part = make_part(name, {})
    for line, out in (
        ("float8_e8m0fnu tensor scale=minmax(offset=true)", r"\(float8_e5m2\)\."),
        ("float8_e8m0fnu group=16 scale=minmax(offset=true)", r"\(float8_e5m2\)\."),
        ("float16_e8m7 group=16 scale_format=bfloat16", r"\(float8_e5m2\), or scale=one\."),
    ):
        with pytest.raises(SchemeError, match=rf"{name} can't learn {line.split()[0]}.*{out}"):
            part.make(Quantizer(line), tensor(WEIGHTS))


def test_bad_starts_and_options() -> None:
    x = tensor(WEIGHTS)
    part = make_part("ste", {})
    with pytest.raises(SchemeError, match=r"ste.*int4.*can't start from.*int8"):
        part.make(Quantizer("int4 channel"), x, Quantizer("int8 channel").quantize(x))
    with pytest.raises(SchemeError, match=r"static.*activations"):
        part.check(Quantizer("int8 tensor static"), WEIGHTS)
    with pytest.raises(SchemeError, match=r"uint4.*symmetric=false"):
        part.check(Quantizer("uint4 channel"), WEIGHTS)
    with pytest.raises(UsageError, match="lsq"):
        make_part("lsqq", {})
    with pytest.raises(SchemeError, match="no option 'rate'"):
        make_part("ste", {"rate": 1})


def test_menu() -> None:
    x = tensor(WEIGHTS)
    lines = ("int4 channel", "int8 channel", "float4_e2m1fn group=8")
    menu = Menu([make_part("lsq", {}).make(Quantizer(line), x) for line in lines])
    outputs = []
    for index, line in enumerate(lines):
        menu.choose(index)
        assert str(menu.quantizer) == line
        outputs.append(menu.eval()(x))
        assert torch.equal(outputs[-1], Quantizer(line).fake_quantize(x))
        assert torch.equal(menu.train()(x), outputs[-1])
    assert not torch.equal(outputs[0], outputs[1])
    assert len(menu.groups()["scales"]) == len(list(menu.parameters())) == 3
    other = Menu([make_part("lsq", {}).make(Quantizer(line), x) for line in lines])
    other.load_state_dict(menu.state_dict())
    assert other.index == 2
    with pytest.raises(SchemeError, match="0 to 2; got 3"):
        menu.choose(3)
    activation = make_part("ste", {}).make(Quantizer("int8 token"), tensor(ACTIVATIONS), side=ACTIVATIONS)
    with pytest.raises(SchemeError, match="all for one side"):
        Menu([menu.chosen, activation])
    assert isinstance(menu, nn.Module)
