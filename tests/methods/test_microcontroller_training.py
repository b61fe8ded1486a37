"""What a faithful PULP-TrainLib must show: arXiv:2305.19167, github.com/pulp-platform/pulp-trainlib."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from tests.parts.microcontroller.networks import SHAPE, Block, everything, stack
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import DataError, ModelError, UsageError
from nybble.microcontroller import matrix_forms as forms
from nybble.microcontroller.arithmetic import Arithmetic, exp32, log32
from nybble.microcontroller.emulator import Emulator
from nybble.microcontroller.losses import LOSSES, loss_and_gradient
from nybble.microcontroller.stack import multiply_adds, plan
from nybble.microcontroller.trace import stack_of
from nybble.microcontroller.transforms import Window, block_transpose, im2row, im2row_of_gradient, to_chw, to_hwc


class Exact(Arithmetic):
    """Products in float64, added in any order."""

    def product(self, a: Tensor, b: Tensor, *, transposed: bool) -> Tensor:
        return a @ (b.transpose(-1, -2) if transposed else b)


EXACT = Exact()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("into", "out", "kernel", "stride", "padding", "groups", "size"),
    [
        (3, 4, 3, 1, (0, 0, 0, 0), 1, 6),
        (3, 4, 3, 2, (1, 0, 1, 0), 1, 6),
        (3, 4, 1, 2, (0, 0, 0, 0), 1, 6),
        (2, 3, 5, 1, (3, 1, 0, 2), 1, 8),
        (4, 4, 3, 2, (1, 1, 1, 1), 4, 7),
        (4, 6, 3, 1, (1, 1, 1, 1), 2, 5),
    ],
    ids=["plain", "strided", "subsampled", "padded", "depthwise", "grouped"],
)
def test_convolutions_are_autograds(
    into: int, out: int, kernel: int, stride: int, padding: tuple[int, int, int, int], groups: int, size: int
) -> None:
    up, down, left, right = padding
    x, w = drawn(into, size, size).requires_grad_(), drawn(out, into // groups, kernel, kernel, seed=1).requires_grad_()
    y = functional.conv2d(functional.pad(x, (left, right, up, down))[None], w, stride=stride, groups=groups)[0]
    dy = drawn(*y.shape, seed=2)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    at = Window(height=size, width=size, kernel=(kernel, kernel), stride=(stride, stride), padding=padding)
    pairs = [
        (forms.conv_forward(EXACT, x, w, at, groups), y),
        (forms.conv_weight(EXACT, x, dy, at, groups), dw),
        (forms.conv_input(EXACT, dy, w, at, groups), dx),
    ]
    if groups == 1:
        pairs += [
            (forms.conv_forward_hwc(EXACT, to_hwc(x), to_hwc(w), at), to_hwc(y)),
            (forms.conv_weight_hwc(EXACT, to_hwc(x), to_hwc(dy), at), to_hwc(dw)),
            (forms.conv_input_hwc(EXACT, to_hwc(dy), to_hwc(w), at), to_hwc(dx)),
        ]
    assert max(float((found - wanted).detach().abs().max()) for found, wanted in pairs) < 1e-12


def test_linear_and_pointwise_are_autograds() -> None:
    x, w = drawn(5, 3, 4).requires_grad_(), drawn(6, 5, seed=1).requires_grad_()
    y = functional.conv2d(x[None], w[..., None, None])[0]
    dy = drawn(*y.shape, seed=2)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    x_hwc, dy_hwc = to_hwc(x), to_hwc(dy)
    pairs = [
        (forms.pointwise_forward(EXACT, x, w), y),
        (forms.pointwise_weight(EXACT, x, dy), dw),
        (forms.pointwise_input(EXACT, dy, w), dx),
        (to_chw(forms.pointwise_forward_hwc(EXACT, x_hwc, w)), y),
        (forms.pointwise_weight_hwc(EXACT, x_hwc, dy_hwc), dw),
        (to_chw(forms.pointwise_input_hwc(EXACT, dy_hwc, w)), dx),
    ]
    v, dv = drawn(5, seed=3).requires_grad_(), drawn(6, seed=4)
    of = torch.autograd.grad(w @ v, (v, w), dv)
    pairs += [(forms.linear_forward(EXACT, v, w), w @ v), (forms.linear_input(EXACT, dv, w), of[0])]
    pairs += [(forms.linear_weight(EXACT, v, dv), of[1])]
    assert max(float((found - wanted).detach().abs().max()) for found, wanted in pairs) < 1e-12


def test_transforms_undo_each_other() -> None:
    w, dy = drawn(4, 3, 3, 2), drawn(4, 5, 6, seed=1)
    assert torch.equal(block_transpose(block_transpose(w)), w) and not torch.equal(
        w[:3, :3], block_transpose(w)[:3, :3]
    )
    assert torch.equal(to_chw(to_hwc(dy)), dy)
    at = Window(height=7, width=7, kernel=(3, 2))
    found = block_transpose(w).flatten(1) @ im2row_of_gradient(dy, at).T
    assert torch.allclose(found.view(3, 7, 7), functional.conv_transpose2d(dy[None], w)[0], atol=1e-12)
    unfolded = functional.unfold(dy[None], (3, 2), stride=1)[0].T
    assert torch.equal(im2row(dy, Window(height=5, width=6, kernel=(3, 2))), unfolded)


@pytest.mark.parametrize(
    ("dtype", "length", "one", "two"),
    [
        (torch.float16, 1000, 1000, 1000), (torch.float16, 4096, 2048, 4096),
        (torch.bfloat16, 1000, 256, 512), (torch.float32, 4096, 4096, 4096),
    ],
)  # fmt: skip
def test_sums_of_ones_stop_where_the_type_does(dtype: torch.dtype, length: int, one: int, two: int) -> None:
    ones = torch.ones(1, length, dtype=dtype)
    for lanes, wanted in ((1, one), (2, two)):
        unit = Arithmetic(dtype=dtype, lanes=lanes)
        assert float(unit.product(ones, ones, transposed=True)) == wanted
        assert float(unit.product(ones, ones.T, transposed=False)) == one  # lanes hold other outputs there


def test_the_order_of_lanes_is_part_of_the_result() -> None:
    """Even and odd k apart, what is left over first: 2048 + 1 is 2048 in float16, 1 + 2050 is 2052."""
    a = torch.tensor([[2048.0, 1, 1, 1, 1]]).half()
    ones = torch.ones(1, 5).half()
    found = {lanes: float(Arithmetic(lanes=lanes).product(a, ones, transposed=True)) for lanes in (1, 2, 4)}
    assert found == {1: 2048, 2: 2052, 4: 2048}
    assert Arithmetic().dtype == torch.float16


def test_errors_grow_with_length_and_shrink_with_lanes() -> None:
    def error(dtype: torch.dtype, length: int, lanes: int) -> float:
        a, b = (drawn(200, 1, length, seed=s).to(dtype) for s in (0, 1))
        found = Arithmetic(dtype=dtype, lanes=lanes).product(a, b, transposed=True).double().flatten()
        off = float((found - (a.double() * b.double()).sum((1, 2))).abs().mean())
        return off / math.sqrt(length)

    half, brain = torch.float16, torch.bfloat16
    assert error(half, 64, 1) < error(half, 512, 1) and error(brain, 64, 1) < error(brain, 512, 1)
    assert error(half, 512, 2) < error(half, 512, 1) < error(brain, 512, 2) < error(brain, 512, 1)


def rounded(exact: Fraction, dtype: torch.dtype) -> float:
    """To nearest even, by whole numbers."""
    digits, least = (11, -24) if dtype == torch.float16 else (8, -133)
    unit = least
    while abs(exact) >= Fraction(2) ** (unit + digits):
        unit += 1
    return float(round(exact / Fraction(2) ** unit) * Fraction(2) ** unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_multiply_adds_round_once(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    scales = [2.0**-9, 1.0, 2.0**4] if dtype == torch.float16 else [2.0**-60, 2.0**-7, 1.0, 2.0**40]
    values = [[rng.gauss(0, 1) * rng.choice(scales) for _ in range(400)] for _ in range(3)]
    a, b, c = (torch.tensor(v).to(dtype) for v in values)
    # products halfway between two numbers, and a little more or less: a second rounding would go to even
    half, least = ((2.0**-5, 2.0**-6), 2.0**-24) if dtype == torch.float16 else ((2.0**-4, 2.0**-4), 2.0**-90)
    a[:4], b[:4] = (torch.tensor(1 + part).to(dtype) for part in half)
    c[:4] = torch.tensor([least, -least, 1.0, -1.0]).to(dtype)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    wanted = torch.tensor([rounded(v, dtype) for v in exact], dtype=torch.float64)
    assert torch.equal(Arithmetic(dtype=dtype, fused=True).multiply_add(c, a, b).double(), wanted)
    assert not torch.equal(Arithmetic(dtype=dtype).multiply_add(c, a, b).double(), wanted)


def test_exp_and_log_are_within_units_of_the_last_place() -> None:
    x = torch.linspace(-86, 87, 20001)
    assert float(((exp32(x).double() - x.double().exp()) / x.double().exp()).abs().max()) < 2 * 2.0**-23
    x = torch.logspace(-30, 30, 20001)
    wanted = x.double().log()
    assert float(((log32(x).double() - wanted) / wanted.abs().clamp(min=0.1)).abs().max()) < 2 * 2.0**-23


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_autograds(kind: str) -> None:
    y, target = drawn(6).float().requires_grad_(), drawn(6, seed=1).float().abs()
    target = target / target.sum()
    error = (y - target).abs()
    bound = 0.2 * error.detach().max()
    wanted = {
        "cross_entropy": lambda: functional.cross_entropy(y[None], target[None]),
        "mse": lambda: functional.mse_loss(y, target),
        "l1": lambda: functional.l1_loss(y, target),
        "berhu": lambda: torch.where(error > bound, (error**2 + bound**2) / (2 * bound), error).mean(),
    }[kind]()
    loss, gradient = loss_and_gradient(kind, y.detach(), target)
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, y)[0], atol=1e-7)
    if kind == "l1":  # the branch of zero is never reached
        assert loss_and_gradient(kind, target, target)[1].tolist() == [pytest.approx(1 / 6)] * 6


def test_a_step_in_float32_is_autograds() -> None:
    network = everything()
    x, label = drawn(*SHAPE).float(), 3
    loss = functional.cross_entropy(network(x[None]), torch.tensor([label]))
    loss.backward()  # type: ignore[no-untyped-call]
    step = Emulator(stack(), Arithmetic(dtype=torch.float32, lanes=2)).step(x, label, 0.1)
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    judged = 0
    for name, found in step.gradients.items():
        for role, gradient in found.items():
            wanted = network.get_parameter(f"{name}.{role}").grad
            assert wanted is not None
            if name == "0":  # a BatchNorm is in it
                continue
            # sums in another order; norms of four pixels magnify that
            assert float((gradient - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-7, (name, role)
            judged += 1
    assert judged == 13


def test_gradients_of_two_branches_are_added() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), Block(6, 4, 1), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval()
    x = drawn(1, 6, 6).float()
    torch.autograd.backward(functional.cross_entropy(network(x[None]), torch.tensor([2])))
    step = Emulator(stack_of(network, (1, 6, 6)), Arithmetic(dtype=torch.float32, lanes=2)).step(x, 2, 0.1)
    for role, gradient in step.gradients["0"].items():
        wanted = network.get_parameter(f"0.{role}").grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_sixteen_bits_is_near_that_in_32(dtype: torch.dtype) -> None:
    """Where gradients are small beside weights, within two units of the last place; a frozen layer stays as it was."""
    x, at = drawn(*SHAPE).float(), {}
    for kind in (dtype, torch.float32):
        emulator = Emulator(stack(), Arithmetic(dtype=kind, lanes=2), update=["4.*", "14"])
        emulator.weights = {n: {r: v.to(dtype).to(kind) for r, v in h.items()} for n, h in emulator.weights.items()}
        before = {n: {r: v.clone() for r, v in h.items()} for n, h in emulator.weights.items()}
        step = emulator.step(x, 3, 0.01)
        at[kind] = emulator.weights
        assert set(step.gradients) == {"4.first", "4.second", "4.norm", "4.beside", "14"}
        assert all(torch.equal(v, before["9"][r]) for r, v in emulator.weights["9"].items())
    digits = 10 if dtype == torch.float16 else 7
    for role, value in at[dtype]["14"].items():
        wide = at[torch.float32]["14"][role]
        unit = torch.exp2(torch.floor(torch.log2(wide.abs())) - digits)
        assert float(((value.float() - wide).abs() / unit).max()) < 2
        assert not torch.equal(value.float(), stack().weights["14"][role].to(dtype).float())


def test_a_sparse_update_stops_below_the_first_that_learns() -> None:
    everywhere, last = plan(stack()), plan(stack(), ["14"])
    assert [layer.name for layer in last.backward] == ["14"] and len(everywhere.backward) == len(stack().layers)
    forward, weight, back = multiply_adds(stack(), last)["14"]
    assert (forward, weight, back) == (35, 35, 0) and multiply_adds(stack(), last)["0"] == (8 * 9 * 144, 0, 0)
    assert multiply_adds(stack(), everywhere)["4.first"] == (6 * 8 * 9 * 9, 6 * 8 * 9 * 9, 6 * 8 * 9 * 36)


def test_the_last_layer_alone_learns_in_sixteen_bits_and_stalls_in_bf16() -> None:
    """Two classes of noise with a mean; small rates leave bfloat16 weights as they are: |rate g| < |w| 2^-9."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    small = stack_of(network, (1, 5, 5))
    x, labels = drawn(120, 1, 5, 5).float(), torch.arange(120) % 2
    x += 2.0 * (labels[:, None, None, None] * 2 - 1)
    right = {}
    for dtype in (torch.float16, torch.float32):
        emulator = Emulator(small, Arithmetic(dtype=dtype, lanes=2), update=["4"])
        for one, label in zip(x[:80], labels, strict=False):
            emulator.step(one, int(label), 1.0)
        outputs = [emulator.forward(one)[small.output].argmax() for one in x[80:]]
        right[dtype] = sum(int(o) == int(label) for o, label in zip(outputs, labels[80:], strict=True)) / 40
    assert right[torch.float32] >= 0.9 and abs(right[torch.float16] - right[torch.float32]) <= 0.025
    emulator = Emulator(small, Arithmetic(dtype=torch.bfloat16), update=["4"])
    before = emulator.weights["4"]["weight"].clone()
    step = emulator.step(x[0], 0, 1e-4)
    assert float(step.gradients["4"]["weight"].abs().max()) > 0
    assert torch.equal(emulator.weights["4"]["weight"], before)
    wide = Emulator(small, Arithmetic(dtype=torch.float32), update=["4"])
    wide.step(x[0], 0, 1e-4)
    assert not torch.equal(wide.weights["4"]["weight"], small.weights["4"]["weight"])


def test_what_a_stack_cannot_be() -> None:
    for network, words in (
        (nn.Sequential(nn.Conv2d(1, 4, 3, stride=2)), r"^0: a stride of 2 doesn't divide the 9 rows .*Pad by 1 more"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2)), r"^0: a dilation of \[2, 2\]"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus()), r"^1: C training code has no form for softplus; it takes"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), r"^2: a BatchNorm .* use InstanceNorm2d"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(3, 1)), r"^1: average pooling .* side by side"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(3)), r"^1: patches of \[3, 3\] don't divide 10 x 10"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU()), r"^1: GELU of erf"),
        (nn.Sequential(nn.Conv2d(2, 4, 3)), r"^Sequential can't be followed on inputs \[1, 1, 12, 12\]"),
        (nn.Sequential(nn.ReLU()), r"^Sequential has no parameter"),
    ):
        with pytest.raises(ModelError, match=words):
            stack_of(network.eval(), SHAPE)
    with pytest.raises(UsageError, match=r"3 groups don't divide 4 channels"):
        at = Window(height=4, width=4, kernel=(1, 1))
        forms.conv_forward(EXACT, drawn(4, 4, 4), drawn(3, 1, 1, 1), at, 3)
    with pytest.raises(UsageError, match=r"lanes is 3"):
        Arithmetic(lanes=3)
    with pytest.raises(UsageError, match=r"no layer with parameters is called '10'"):
        Emulator(stack(), Arithmetic(), update=["10"])
    emulator = Emulator(stack(), Arithmetic())
    with pytest.raises(
        DataError, match=r"shape \[2, 1, 12, 12\]; the network takes one sample at a time, \[1, 12, 12\]"
    ):
        emulator.step(torch.zeros(2, *SHAPE), 0, 0.1)
    with pytest.raises(DataError, match=r"class 5: the network has 5"):
        emulator.step(torch.zeros(SHAPE), 5, 0.1)
