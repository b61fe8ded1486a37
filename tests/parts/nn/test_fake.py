"""FakeLayer: the numbers of the packed layer, in every dtype and kind, with gradients that a float layer would give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from nybble.core.errors import SchemeError
from nybble.learned import ACTIVATIONS, Learned, Menu, make_part
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.fake import FakeLayer, penalty_of
from nybble.nn.kinds import kind_of, live
from nybble.quantizer import Quantizer

DTYPES = [torch.float32, torch.bfloat16]


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations that touch numbers: each is a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or name in ("_unsafe_view", "empty_like", "detach", "new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def conv1d(bias: bool = True) -> nn.Module:
    make: Any = Conv1D
    layer: Any = make(24, 32)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer  # type: ignore[no-any-return]


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 24), (2, 5, 32)),
    "no bias": (lambda: nn.Linear(32, 24, bias=False), (7, 32)),
    "Conv1D": (conv1d, (2, 5, 32)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), (2, 8, 9, 9)),
    "signal": (lambda: nn.Conv1d(8, 16, 4, dilation=2, padding="same", padding_mode="circular"), (2, 8, 12)),
}


def twin(kind: str, dtype: torch.dtype, weights: str = "ste", inputs: str = "ste") -> tuple[FakeLayer, Tensor]:
    make, shape = LAYERS[kind]
    layer: nn.Module = make().to(dtype)
    x = torch.randn(shape).to(dtype)
    known = kind_of(layer)
    assert known is not None
    matrix = known.matrix(layer, "", live(layer))
    learned = make_part(weights, {}).make(Quantizer("float4_e2m1fn group=4"), matrix)
    entering = make_part(inputs, {}).make(Quantizer("int8 tensor static"), x, side=ACTIVATIONS)
    leaving = make_part("ste", {}).make(Quantizer("float8_e4m3fn tensor"), x, side=ACTIVATIONS)
    return FakeLayer(layer, None, learned, entering, leaving), x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_packed_layer(kind: str, dtype: torch.dtype) -> None:
    fake, x = twin(kind, dtype, "lsq", "lsq")
    optimizer = torch.optim.SGD(fake.parameters(), 0.05)
    for _ in range(2):
        fake.train()(x).float().square().mean().backward()
        optimizer.step()
    packed = fake.eval().settle()
    with torch.no_grad():
        found = fake(x)
        assert found.dtype == dtype
        assert torch.equal(found, packed(x))
        assert torch.equal(fake.train()(x), found)  # of these parts the training formula has the same values
    assert {k: v.dtype for k, v in packed.named_parameters()} == ({} if kind == "no bias" else {"bias": dtype})
    assert all(p.dtype == torch.float32 for p in fake.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_without_quantizers_it_is_the_float_layer(kind: str) -> None:
    """The same outputs and gradients as the layer itself: nothing but rounding comes in between."""
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    fake = FakeLayer(layer)
    expected, found = layer(x), fake(x)
    assert torch.equal(found, expected)
    assert torch.equal(fake.settle()(x), expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    matrix = layer.weight.grad.T if kind == "Conv1D" else layer.weight.grad.flatten(1)
    torch.testing.assert_close(fake.weight.latent.grad, matrix, rtol=1e-5, atol=1e-5)
    if layer.bias is not None:
        assert fake.bias is not None
        torch.testing.assert_close(fake.bias.grad, layer.bias.grad, rtol=1e-5, atol=1e-5)


def test_gradients_reach_inputs_through_both_quantizers() -> None:
    fake, x = twin("linear", torch.float32)
    x.requires_grad_()
    fake.train()(x).square().sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() > 0.9 * x.numel()


def test_a_calibrated_quantizer_is_taken_as_it_is() -> None:
    """An ActivationQuantizer (of a solver) stays what it was when packed, and passes gradients in training."""
    layer, x = nn.Linear(32, 24), 4 * torch.randn(7, 32)
    for line in ("int8 tensor static", "uint4 tensor static symmetric=false", "float4_e2m1fn shifted static"):
        quantizer = Quantizer(line)
        given = ActivationQuantizer(quantizer, quantizer.fit(0.5 * x))
        fake = FakeLayer(layer, inputs=given).eval()
        packed = fake.settle()
        assert torch.equal(fake(x), packed(x))
        assert torch.equal(fake(x), layer(given(x)))
        assert packed.inputs is not None
        stored = packed.inputs.state_dict()
        assert all(torch.equal(value, stored[key]) for key, value in given.state_dict().items())
        y = x.clone().requires_grad_()
        fake.train()(y).sum().backward()
        assert y.grad is not None
        clipped = x.abs() > 1.25 * given(1000 * x).abs()  # far beyond the largest value of its column
        assert clipped.any() and (y.grad[clipped] == 0).all() and (y.grad[~clipped] != 0).any()


def test_casting_the_model_keeps_the_truth() -> None:
    fake, x = twin("linear", torch.float32, "lsq", "lsq")
    latent = fake.weight.latent.detach().clone()
    model = nn.Sequential(fake).to(torch.bfloat16).eval()
    assert torch.equal(fake.weight.latent, latent) and fake.dtype == torch.bfloat16
    x = x.bfloat16()
    packed = fake.settle()
    assert packed.bias is not None and packed.bias.dtype == torch.bfloat16
    assert torch.equal(model(x), packed(x))


def test_the_float_layer_and_the_packed_one_are_left_alone() -> None:
    layer, x = nn.Linear(32, 24), torch.randn(3, 32)
    before = copy.deepcopy(layer)
    fake = FakeLayer(layer, weights=make_part("ste", {}).make(Quantizer("int4 channel"), layer.weight))
    packed = fake.settle()
    first = packed(x)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.mul_(2)
    assert torch.equal(packed(x), first)
    assert torch.equal(layer(x), before(x))
    assert torch.equal(copy.deepcopy(fake).eval()(x), fake.eval()(x))


def test_state_and_groups() -> None:
    fake, x = twin("conv", torch.float32, "lsq", "lsq")
    assert set(fake.groups()) == {"weight", "bias", "weights.scales", "inputs.scales"}
    assert sum(len(found) for found in fake.groups().values()) == len(list(fake.parameters()))
    fake.train()(x).sum().backward()
    torch.optim.SGD(fake.parameters(), 0.1).step()
    other, _ = twin("conv", torch.float32, "lsq", "lsq")
    other.load_state_dict(fake.state_dict())
    assert torch.equal(other.eval()(x), fake.eval()(x))
    fixed = FakeLayer(nn.Linear(8, 8), trainable=False)
    assert not any(p.requires_grad for p in fixed.parameters())


def test_a_folded_norm_is_remembered() -> None:
    layer = nn.Conv2d(8, 16, 3)
    learned = make_part("ste", {}).make(Quantizer("int4 channel"), layer.weight.flatten(1))
    packed: Any = FakeLayer(layer, weights=learned, folded="bn1").settle()
    assert packed.folded == "bn1"


def test_a_menu() -> None:
    layer, x = nn.Linear(32, 24), torch.randn(3, 32)
    lines = ("int4 channel", "int8 channel")
    menu = Menu([make_part("ste", {}).make(Quantizer(line), layer.weight) for line in lines])
    fake = FakeLayer(layer, weights=menu).eval()
    for index, line in enumerate(lines):
        menu.choose(index)
        packed = fake.settle()
        assert torch.equal(fake(x), packed(x))
        weight: Any = packed.weight
        assert weight.spec["format"] == line.split()[0]


def test_penalties_add_up() -> None:
    layer = nn.Linear(32, 24)
    parts: list[Learned] = [make_part("adaround", {}).make(Quantizer("int4 channel"), layer.weight)]
    fake = FakeLayer(layer, weights=parts[0])
    assert torch.equal(fake.penalty(1.0), parts[0].penalty(1.0)) and fake.penalty(1.0) > 0
    assert FakeLayer(layer).penalty(1.0) == 0
    two = nn.Sequential(fake, nn.ReLU(), FakeLayer(layer, weights=parts[0]))
    assert torch.equal(penalty_of(two, 1.0), 2 * fake.penalty(1.0)) and penalty_of(nn.ReLU(), 1.0) == 0


def test_answers_as_the_packed_layer_does() -> None:
    fake, _ = twin("conv", torch.float32)
    conv: Any = fake
    assert (conv.kernel_size, conv.stride) == ((3, 3), (2, 2)) and not isinstance(conv.weight, Tensor)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = conv.nothing_such


def test_refusals() -> None:
    layer, x = nn.Linear(32, 24), torch.randn(3, 32)
    with pytest.raises(SchemeError, match="LayerNorm is no layer with one matrix"):
        FakeLayer(nn.LayerNorm(4))
    weights = make_part("ste", {}).make(Quantizer("int4 channel"), layer.weight)
    with pytest.raises(SchemeError, match="int4 channel is learned for weights, and stands for activations"):
        FakeLayer(layer, inputs=weights)
    token = make_part("ste", {}).make(Quantizer("int8 channel static"), x, side=ACTIVATIONS)
    with pytest.raises(SchemeError, match="static activations have one"):
        FakeLayer(layer, inputs=token)


def test_a_step_of_lsq_is_one_launch_more_for_each_side_and_way() -> None:
    """On a GPU the cast of the weight is in its rounding; a step waits for one launch after another."""
    x, layer = torch.randn(4, 32), nn.Linear(32, 24, bias=False).bfloat16()
    weights = make_part("lsq", {}).make(Quantizer("int4_full channel scale=learned"), layer.weight.detach().float())
    inputs = make_part("lsq", {}).make(Quantizer("int4 tensor static scale=learned"), x, side=ACTIVATIONS)
    fake, x = FakeLayer(layer, None, weights, inputs).train(), x.bfloat16().requires_grad_()
    with Launches() as forward:
        y = fake(x)
    upstream = torch.ones_like(y)
    with Launches() as backward:
        y.backward(upstream)
    assert forward.names == ["scaled_round", "scaled_round", "_to_copy", "mm"]
    assert sorted(backward.names) == ["mm", "mm", "straight_round_backward", "straight_round_backward"]
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in fake.parameters())
