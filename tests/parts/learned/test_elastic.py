"""Elastic activations: the tables of BiT and TBT, torch's learnable fake quantization, and what a batch decides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.learned import ACTIVATIONS, make_part
from nybble.learned.elastic import ElasticScale
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

#: format -> Q_N, Q_P and whether it is the set of signs
SETS = {"uint1": (0, 1), "uternary": (0, 2), "ternary": (-1, 1), "int2_full": (-2, 1), "binary": (-1, 1)}
A, B = 0.75, 0.125
"""Scale and threshold of the tables; with the points below, u = (x - b) / a is exact at every end that matters."""


def made(fmt: str, x: Tensor, scale: float = A, threshold: float | None = B, factor: bool = False) -> ElasticScale:
    options = {"threshold": "none" if threshold is None else "tensor", "gradient_factor": factor}
    found = make_part("elastic", options).make(Quantizer(f"{fmt} tensor static scale=elastic"), x, side=ACTIVATIONS)
    assert isinstance(found, ElasticScale)
    with torch.no_grad():
        found.scale.fill_(scale)
        if threshold is not None:
            assert found.threshold is not None
            found.threshold.fill_(threshold)
    return found.train()


def gradients(part: ElasticScale, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The output, and what reaches x, a and b."""
    part.zero_grad()
    x = x.clone().requires_grad_()
    found = part(x)
    found.backward(upstream)
    assert x.grad is not None and part.scale.grad is not None
    return found.detach(), x.grad, part.scale.grad, None if part.threshold is None else part.threshold.grad


def code_of(fmt: str, u: Tensor) -> Tensor:
    """float64: what u is rounded to; ties to even, the sign of 0 is +1."""
    low, high = SETS[fmt]
    return torch.where(u >= 0, 1.0, -1.0) if fmt == "binary" else u.clamp(low, high).round()


def points() -> Tensor:
    """float64 x in and around every range, halfway points, ends and a -0 among them; none between two of float32."""
    return B + A * torch.cat(
        [torch.arange(-56, 57, dtype=torch.float64) / 16, torch.tensor([-0.0], dtype=torch.float64)]
    )


@pytest.mark.parametrize("fmt", SETS)
def test_the_tables_point_by_point(fmt: str) -> None:
    """Values exactly; derivatives to a, b and x as the papers' cases have them, in float64; ends are inside."""
    low, high = SETS[fmt]
    x = points()
    u = (x - B) / A
    code, inside = code_of(fmt, u), (u >= low) & (u <= high)
    to_a = code if fmt == "binary" else torch.where(inside, code - u, code)
    part = made(fmt, x.float())
    found, to_x, _, _ = gradients(part, x.float(), torch.ones(len(x)))
    assert torch.equal(found.double(), A * code) and set(found.tolist()) <= {A * v for v in get_format(fmt).grid}
    assert torch.equal(to_x.double(), inside.double())
    for i, one in enumerate(torch.eye(len(x))):
        _, _, a, b = gradients(part, x.float(), one)
        assert b is not None and b.item() == -float(inside[i])
        assert a.item() == pytest.approx(float(to_a[i]), abs=2e-7)


@pytest.mark.parametrize("fmt", [fmt for fmt in SETS if fmt != "binary"])
def test_finite_differences_of_the_surrogate(fmt: str) -> None:
    """With the residue of the rounding frozen: x - b + a r inside, the end's multiple of a outside."""
    low, high = SETS[fmt]
    x = torch.linspace(-2.03, 2.71, 97, dtype=torch.float64)
    upstream = torch.linspace(-1, 2, 97, dtype=torch.float64)
    u = (x - B) / A
    code, inside = code_of(fmt, u), (u >= low) & (u <= high)
    residue = code - u

    def surrogate(a: float, b: float) -> float:
        return float((upstream * torch.where(inside, x - b + a * residue, a * code)).sum())

    step = 1e-4
    to_a = (surrogate(A + step, B) - surrogate(A - step, B)) / (2 * step)
    to_b = (surrogate(A, B + step) - surrogate(A, B - step)) / (2 * step)
    _, _, a, b = gradients(made(fmt, x.float()), x.float(), upstream.float())
    assert b is not None and a.item() == pytest.approx(to_a, rel=1e-5) and b.item() == pytest.approx(to_b, rel=1e-5)


@pytest.mark.parametrize("fmt", ["uint1", "uternary", "ternary", "int2_full"])
def test_torchs_learnable_fake_quantization(fmt: str) -> None:
    """Rounded sets without a threshold, value and gradients; torch counts half a step beyond the ends as inside."""
    low, high = SETS[fmt]
    x = 1.5 * torch.randn(400)
    y = x / 0.5
    x[((y < low) & (y >= low - 0.5)) | ((y > high) & (y <= high + 0.5))] = 0.2
    upstream, scale, theirs = torch.randn(400), torch.tensor([0.5], requires_grad=True), x.clone().requires_grad_()
    expected = torch._fake_quantize_learnable_per_tensor_affine(
        theirs, scale, torch.zeros(1, requires_grad=True), low, high, 1 / math.sqrt(400 * high)
    )
    expected.backward(upstream)  # type: ignore[no-untyped-call]
    found, to_x, to_a, _ = gradients(made(fmt, x, 0.5, None, factor=True), x, upstream)
    assert torch.equal(found, expected) and theirs.grad is not None and torch.equal(to_x, theirs.grad)
    torch.testing.assert_close(to_a.reshape(1), scale.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fmt", "top"), [("binary", 1), ("ternary", 1), ("uint1", 1), ("uternary", 2), ("int2_full", 1)]
)
def test_the_factor_is_of_the_scale_alone(fmt: str, top: int) -> None:
    """g = 1 / sqrt(N Q_P), N the elements of this tensor; values, x and b don't see it."""
    for shape in ((2, 5, 8), (3, 7)):
        x, upstream = torch.randn(shape), torch.randn(shape)
        plain = gradients(made(fmt, x), x, upstream)
        scaled = gradients(made(fmt, x, factor=True), x, upstream)
        assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1])
        assert plain[3] is not None and scaled[3] is not None and torch.equal(plain[3], scaled[3])
        assert scaled[2].item() == pytest.approx(plain[2].item() / math.sqrt(x.numel() * top), rel=1e-6)


def test_a_threshold_for_each_channel() -> None:
    """Each as the one of a tensor that has this channel alone; training, eval and what is stored agree."""
    x = torch.randn(4, 6, 3)
    part = make_part("elastic", {"threshold": "channel", "gradient_factor": False}).make(
        Quantizer("ternary tensor static scale=elastic"), x, side=ACTIVATIONS
    )
    assert isinstance(part, ElasticScale) and part.threshold is not None and part.threshold.shape == (3,)
    with torch.no_grad():
        part.threshold.copy_(torch.tensor([-0.3, 0.0, 0.4]))
    found, to_x, to_a, to_b = gradients(part.train(), x, torch.ones_like(x))
    alone = [made("ternary", x[..., i], part.scale.item(), part.threshold[i].item()) for i in range(3)]
    each = [gradients(one, x[..., i], torch.ones(4, 6)) for i, one in enumerate(alone)]
    for i in range(3):
        assert torch.equal(found[..., i], each[i][0]) and torch.equal(to_x[..., i], each[i][1])
        assert to_b is not None and each[i][3] is not None and to_b[i] == each[i][3]
    torch.testing.assert_close(to_a, sum((one[2] for one in each), torch.zeros(())).reshape(to_a.shape))
    assert torch.equal(part.eval()(x), found)
    stored = part.quantizer.quantize(x, part.fixed())
    assert torch.equal(stored.dequantize(), found) and stored.params.shift is not None


def test_the_first_batch_decides() -> None:
    """Published code: 2 mean|x| / sqrt(Q_P), without a sign 4 mean|x| / sqrt(2^bits - 1); text: least squares."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    mean, positive = x.abs().mean().item(), x.abs()
    for fmt, expected in {
        "binary": 2 * mean, "ternary": 2 * mean, "int2_full": 2 * mean, "uint1": 4 * mean,
        "uternary": 4 * mean / math.sqrt(3), "uint2": 4 * mean / math.sqrt(3),
    }.items():  # fmt: skip
        given = positive if fmt.startswith("u") else x
        part = make_part("elastic", {}).make(Quantizer(f"{fmt} tensor static scale=elastic"), given, side=ACTIVATIONS)
        assert isinstance(part, ElasticScale) and part.threshold is not None and part.threshold.item() == 0
        assert part.scale.item() == pytest.approx(expected, rel=1e-6)
    for fmt, rule, expected in (
        ("binary", "mean", mean),
        ("uint1", "mean(least=0.5)", positive[positive >= 0.5].mean().item()),
    ):
        part = make_part("elastic", {}).make(Quantizer(f"{fmt} tensor static scale={rule}"), positive, side=ACTIVATIONS)
        assert isinstance(part, ElasticScale) and part.scale.item() == pytest.approx(expected, rel=1e-6)


def test_a_later_stage_begins_where_one_ended() -> None:
    """BiT's chain: the 1-bit student takes a and b of the 2-bit one, whose codes are others."""
    x = torch.randn(32, 4)
    first = made("int2_full", x, 0.4, 0.25).fixed()
    line = Quantizer("binary tensor static scale=elastic")

    def begun(threshold: str, start: QuantParams) -> ElasticScale:
        found = make_part("elastic", {"threshold": threshold}).make(line, x, start, ACTIVATIONS)
        assert isinstance(found, ElasticScale) and found.scale.item() == pytest.approx(0.4)
        return found

    assert begun("none", first).threshold is None
    for threshold, count in (("tensor", 1), ("channel", 4)):
        second = begun(threshold, first)
        assert second.threshold is not None and second.threshold.tolist() == [0.25] * count
    with pytest.raises(SchemeError, match=r"1 values here and can't begin with 4.*threshold=channel"):
        begun("tensor", begun("channel", first).fixed())


def test_zero_is_zero_without_a_sign_and_plus_one_with_one() -> None:
    """Masked entries of attention stay exactly 0 in {0, a}, whatever threshold training gave; -0 is no third value."""
    x = torch.softmax(torch.randn(4, 16), -1)
    x[:, 10:] = 0
    for threshold in (-0.3, 0.0, 0.2):  # half of a below 0 it would be a
        found = made("uint1", x, 0.75, threshold).eval()(x)
        assert not found[:, 10:].any() and found.min() == 0
    signs = made("binary", torch.tensor([0.0, -0.0, 1e-30, -1e-30]), A, None)
    assert signs(torch.tensor([0.0, -0.0, 1e-30, -1e-30])).tolist() == [A, A, A, -A]
    assert torch.equal(signs.eval()(torch.tensor([0.0, -0.0])), torch.tensor([A, A]))


def test_softmax_rows_want_the_set_without_a_sign() -> None:
    """Each set at its best scale: {0, a} loses clearly less, and nothing negative comes of it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.softmax(3 * torch.randn(64, 32, generator=generator), -1)

    def lost(fmt: str) -> float:
        scales = torch.linspace(0.01, 1, 200).tolist()
        return min(float((made(fmt, x, a, None).eval()(x) - x).square().sum()) for a in scales)

    assert lost("uint1") < 0.6 * lost("binary")
    assert made("uint1", x, 0.5, None).eval()(x).min() == 0 and made("uternary", x, 0.2, None).eval()(x).min() == 0


def test_below_the_floor_it_recovers() -> None:
    """A step too large made a negative: no NaN, the floor is used, and its gradient brings it back."""
    x = torch.randn(64)
    part = made("ternary", x, -0.5, None)
    assert part(x).abs().max() == part.eval()(x).abs().max() == pytest.approx(1e-5)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.02)
    part.train()
    for _ in range(40):
        optimizer.zero_grad()
        (part(x) - x).square().mean().backward()
        optimizer.step()
    assert part.scale.item() > 0.3
    assert made("binary", x, 0.0, None).eval()(x).isfinite().all()


def test_nothing_and_zeros() -> None:
    """An empty batch passes; of zeros the first scale is the format's, or the floor where there is no zero."""
    part = made("ternary", torch.randn(8))
    empty = torch.empty(0, 8, requires_grad=True)
    part(empty).sum().backward()
    assert part(empty).shape == part.eval()(empty).shape == (0, 8)
    for fmt, first in (("uint1", 1.0), ("binary", 1e-5)):
        zeros = make_part("elastic", {}).make(
            Quantizer(f"{fmt} tensor static scale=elastic"), torch.zeros(4, 8), side=ACTIVATIONS
        )
        assert isinstance(zeros, ElasticScale) and zeros.scale.item() == pytest.approx(first)
        assert zeros(torch.zeros(4, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ternary tensor", "measures those of each tensor: write 'tensor static'"),
        ("ternary token", "write 'tensor static'"),
        ("ternary shifted static", "has none, or factors"),
        ("ternary tensor static scale=one", "without scale=one"),
    ],
)
def test_refusals(line: str, said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        make_part("elastic", {}).check(Quantizer(line), ACTIVATIONS)


def test_bad_options_and_beginnings() -> None:
    quantizer, nan = Quantizer("ternary tensor static scale=elastic"), torch.tensor([1.0, torch.nan])
    with pytest.raises(SchemeError, match=r"can't begin at a scale of nan.*hold NaN"):
        make_part("elastic", {}).make(quantizer, nan, side=ACTIVATIONS)
    with pytest.raises(SchemeError, match="floor=0 is the smallest scale"):
        make_part("elastic", {"floor": 0.0})
    with pytest.raises(SchemeError, match="threshold"):
        make_part("elastic", {"threshold": "row"})
    assert isinstance(made("ternary", torch.ones(3)), nn.Module)
