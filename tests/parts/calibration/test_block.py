"""One truth of each weight, and stand-ins that leave when the float network runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.core.errors import ModelError
from nybble.nn.kinds import Quantized, Target, kind_of
from nybble.nn.linear import QuantLinear
from nybble.quantizer import Quantizer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x))
        return y


def made(dtype: torch.dtype = torch.bfloat16) -> tuple[BlockState, dict[str, Tensor]]:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    precise = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    return BlockState(block.to(dtype), "model.layers.3", precise), precise


def test_the_truth_is_the_sources_own() -> None:
    state, precise = made()
    assert state.prefix == "model.layers.3."
    for name, tensor in precise.items():
        assert torch.equal(state.get(name), tensor) and state.get(name).dtype == torch.float32
    state.put("one.weight", precise["one.weight"] * 3)
    assert torch.equal(state.get("one.weight"), precise["one.weight"] * 3)
    live: Any = state.module.get_parameter("one.weight")
    assert live.dtype == torch.bfloat16 and torch.equal(live, (precise["one.weight"] * 3).bfloat16())
    state.put("one.bias", torch.arange(6.0) / 7)  # there was none
    assert torch.equal(state.get("one.bias"), torch.arange(6.0) / 7)
    assert state.module.get_parameter("one.bias").dtype == torch.bfloat16
    assert not state.has("one.nothing") and not state.has("three.weight")
    with pytest.raises(ModelError, match=r"model\.layers\.3\.three\.weight is no tensor"):
        state.get("three.weight")


@pytest.mark.parametrize("how", ["in place", "data", "replaced"])
def test_a_write_past_put_is_noticed(how: str) -> None:
    """A transform that forgets the truth would be undone by the solver, which starts from it."""
    state, _ = made()
    live: Any = state.module.get_parameter("one.weight")
    if how == "in place":
        live.mul_(2)
    elif how == "data":
        live.data = live * 2
    else:
        state.module.get_submodule("one").weight = nn.Parameter(live * 2)
    with pytest.raises(RuntimeError, match=r"one\.weight was written to without BlockState\.put"):
        state.get("one.weight")


def test_without_a_precise_copy_the_module_is_the_truth() -> None:
    block = Block().requires_grad_(False)
    state = BlockState(block, "")
    block.one.weight.mul_(2)
    assert torch.equal(state.get("one.weight"), block.one.weight)


def target(module: nn.Module, name: str) -> Target:
    kind = kind_of(module.get_submodule(name))
    assert kind is not None
    return next(iter(kind.targets(name, module.get_submodule(name))))


def test_stand_ins_leave_for_the_float_path() -> None:
    state, precise = made(torch.float32)
    x = torch.randn(5, 4)
    exact, order = state.module(x), list(state.module.state_dict())
    one = target(state.module, "one")
    packed = Quantizer("int3 channel").quantize(precise["one.weight"])
    layer = state.install(one, Quantized(weights=(packed,)))
    assert isinstance(layer, QuantLinear) and state.module.get_submodule("one") is layer is state.installed(one)
    rounded = state.module(x)
    assert not torch.equal(rounded, exact)
    with state.on("float") as module:
        assert torch.equal(module(x), exact) and list(module.state_dict()) == order
    with state.on("quantized") as module:
        assert torch.equal(module(x), rounded)
    assert torch.equal(state.get("one.weight"), precise["one.weight"])  # the truth is there behind the stand-in
    assert torch.equal(state.matrix(one), precise["one.weight"])
    again = state.install(one, Quantized(weights=(Quantizer("int8 channel").quantize(precise["one.weight"]),)))
    assert state.module.get_submodule("one") is again and again is not layer
    state.settle()
    with state.on("float") as module:
        assert module.get_submodule("one") is again  # what is settled stays


def test_fused_experts_and_operands_leave_too() -> None:
    model = tiny_model("mixtral", torch.float32)
    block = model.model.layers[0].requires_grad_(False)
    state = BlockState(block, "model.layers.0")
    names = list(block.state_dict())
    kind = kind_of(block.mlp.experts)
    assert kind is not None
    for each in kind.targets("mlp.experts", block.mlp.experts):
        matrices = state.matrix(each)
        state.install(each, Quantized(weights=[Quantizer("int4 channel").quantize(m) for m in matrices]))
    assert list(block.state_dict()) != names
    with state.on("float") as module:
        assert list(module.state_dict()) == names
        assert isinstance(module.get_submodule("mlp.experts").down_proj, nn.Parameter)
    assert not isinstance(block.mlp.experts.down_proj, nn.Parameter)
