"""Fused experts: what each expert's two products read, computed again, gives the module's own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nybble.core.errors import ModelError
from nybble.models.adapter import adapter_for
from nybble.nn.kinds import Target, kind_of, matrix_at, targets_of, values_at
from nybble.nn.routing import routed_inputs

MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]


def experts_of(model: Any) -> nn.Module:
    block = adapter_for(model).blocks_of(model)[1]
    (name,) = {target.module for target in targets_of(block).values() if target.kind.fused}
    assert name == adapter_for(model).experts
    return block.get_submodule(name)


def fused(module: nn.Module) -> list[Target]:
    kind = kind_of(module)
    assert kind is not None and kind.fused
    return list(kind.targets("experts", module))


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_routed_inputs_rebuild_the_output(family: str, make_model: Any) -> None:
    model = make_model(family, experts_implementation="eager")
    module = experts_of(model)
    hidden = torch.randn(10, 32, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([[0, 1], [1, 3]] * 5)  # expert 2 gets nothing
    gates = torch.rand(10, 2, generator=torch.Generator().manual_seed(4))
    rebuilt = torch.zeros_like(hidden)
    seen: list[int] = []
    for routed in routed_inputs(module, hidden, index, gates):
        assert torch.equal(routed.hidden, hidden[routed.tokens])
        down = routed.inner @ module.get_parameter("down_proj")[routed.expert].T
        rebuilt.index_add_(0, routed.tokens, down * routed.gates[:, None])
        seen.append(routed.expert)
    assert seen == [0, 1, 3]
    # Sums of two terms of order 0.1 in another order: a few float32 roundings.
    torch.testing.assert_close(rebuilt, module(hidden, index, gates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MOE)
def test_weights_are_described(family: str, make_model: Any) -> None:
    model = make_model(family)
    inner = 48 if family == "mixtral" else 16
    first, second = fused(experts_of(model))
    assert (first.name, first.leaf, first.shape) == ("experts.gate_up_proj", "gate_up_proj", (2 * inner, 32))
    assert (second.name, second.leaf, second.shape) == ("experts.down_proj", "down_proj", (32, inner))
    assert first.module == second.module == "experts" and first.matrices == second.matrices == 4


@torch.no_grad()
def test_transposed_interleaved_experts_with_biases() -> None:
    """gpt-oss keeps [in, out], interleaves gate and up, adds biases, and gates in its own way."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    config._experts_implementation = "eager"
    make: Any = GptOssExperts
    module = make(config)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    first, second = fused(module)
    assert (first.shape, second.shape) == ((12, 8), (8, 6))
    root = nn.ModuleDict({"experts": module})
    for leaf in ("gate_up_proj", "down_proj"):
        matrix = matrix_at(root, f"experts.{leaf}")
        assert torch.equal(matrix[2], module.get_parameter(leaf)[2].T)
        assert torch.equal(values_at(root, f"experts.{leaf}", matrix)[f"experts.{leaf}"], module.get_parameter(leaf))
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(6))
    index, gates = torch.tensor([[0], [2], [2], [0], [2]]), torch.ones(5, 1)
    rebuilt = torch.zeros_like(hidden)
    for routed in routed_inputs(module, hidden, index, gates):
        product = routed.inner @ module.down_proj[routed.expert] + module.down_proj_bias[routed.expert]
        rebuilt.index_add_(0, routed.tokens, product)
    torch.testing.assert_close(rebuilt, module(hidden, index, gates), rtol=1e-5, atol=1e-5)


class Routed(nn.Module):
    def forward(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return hidden


def test_refusals() -> None:
    module = Routed()
    for name in ("gate_up_proj", "down_proj", "side_proj"):
        module.register_parameter(name, nn.Parameter(torch.zeros(2, 4, 4)))
    with pytest.raises(ModelError, match="3-D weight 'side_proj'"):
        targets_of(module)
