"""A float network computed with other weights, and with its quantizers in place, with gradients to what changes it.

What changes a block's weights is a list of rewrites; their parameters are what is learned. Every forward of a block
rewrites its float32 weights, rounds them (and what its layers read) as the scheme says, straight through, and computes
with that; backwards the block is computed once more, so that one block's rewritten weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nybble.calibration.block import BlockState
from nybble.calibration.lessons import Inputs, Network, main_output
from nybble.core.explicit import no_autocast
from nybble.learned import ACTIVATIONS, WEIGHTS
from nybble.learned.ste import StraightThrough
from nybble.nn.fake import FakeLayer
from nybble.nn.kinds import LayerKind, Target
from nybble.nn.kv_model import no_cache
from nybble.quantizer import Quantizer
from nybble.transforms import Rewrite

Rewrites = Sequence[tuple[Rewrite, Callable[[], Mapping[str, Tensor]]]]
"""Each with what gives its parameters as they are now."""


class RoundedBlock:
    """A block (or what is in no block) on its way through this: see the module.

    Args:
        state: the block, float32.
        rewrites: of its weights, in order.
        weights: whether weights are rounded; inputs and outputs of layers are in any case. Of a scheme's static ranges,
            which are not known yet, every batch has its own. Operands of attention stay in float.
    """

    def __init__(self, state: BlockState, rewrites: Rewrites, weights: bool) -> None:
        self.state, self.rewrites = state, rewrites
        names = {name for rewrite, _ in rewrites for name in rewrite.weights}
        self.truth = {name: state.get(name) for name in names}
        self.fused: list[Target] = []
        for target in state.targets:
            rule = target.rule
            if isinstance(target.kind, LayerKind):
                state.replace(target, _twin(state, target, weights))
            elif weights and rule.weights is not None:
                self.fused.append(target)
                self.truth |= {name: state.get(name) for name in target.parameters}

    def rewritten(self) -> dict[str, Tensor]:
        """The float32 tensors that change, by the float block's names; with gradients."""
        found: dict[str, Tensor] = {}
        with self.state.on("float"), no_autocast(next(iter(self.state.module.parameters())).device):
            for rewrite, now in self.rewrites:
                given = {name: found[name] if name in found else self.truth[name] for name in rewrite.weights}
                found |= rewrite.function(given, now())
        return found

    def lent(self) -> dict[str, Tensor]:
        """What stands for the parameters of the block with its twins, by name there."""
        left = self.rewritten()
        with self.state.on("float"):
            matrices = {target.name: self._matrix(target, left) for target in self.state.targets}
            for target in self.fused:
                left |= self._rounded(target, matrices[target.name])
        found = dict[str, Tensor]()
        for target in self.state.targets:
            if isinstance(target.kind, LayerKind):
                if left.keys() & set(target.parameters):
                    found[f"{target.name}.weight.latent"] = matrices[target.name]
                left = {name: value for name, value in left.items() if name not in target.parameters}
        return found | left

    def _matrix(self, target: Target, values: Mapping[str, Tensor]) -> Tensor:
        def get(key: str) -> Tensor:
            name = f"{target.module}.{key}" if target.module else key
            return values[name] if name in values else self.state.get(name)

        return target.kind.matrix(self.state.float_module(target.module), target.leaf, get)

    def _rounded(self, target: Target, matrix: Tensor) -> dict[str, Tensor]:
        """Fused experts and tables, whose matrices nothing stands for, under their own names."""
        quantizer = target.rule.weights
        assert quantizer is not None
        each = matrix if matrix.dim() > 2 else matrix[None]
        soft = torch.stack([quantizer.soft(one) for one in each]).reshape(matrix.shape)
        found = target.kind.values(self.state.float_module(target.module), target.leaf, soft)
        return {f"{target.module}.{leaf}" if target.module else leaf: value for leaf, value in found.items()}

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward`` of the block with what is lent."""
        values = self.lent()
        self.state.lends = lambda: values
        try:
            with self.state.on("quantized"):
                return forward(*args, **kwargs)
        finally:
            self.state.lends = None


class RoundedNetwork:
    """The network, callable as such.

    Args:
        network: whose model this changes for good.
        rewrites: of a block by its full name; of what is in none by the empty name.
        weights: as for :class:`RoundedBlock`.
    """

    def __init__(self, network: Network, rewrites: Callable[[BlockState], Rewrites], weights: bool) -> None:
        self.network, self.model = network, network.model.requires_grad_(False)
        self.blocks: dict[str, RoundedBlock] = {}
        for name in ("", *network.adapter.block_names(self.model)):
            state = BlockState(self.model.get_submodule(name), name, None, network.targets.get(name, ()))
            self.blocks[name] = RoundedBlock(state, rewrites(state), weights)
        for name, block in self.blocks.items():
            if name:
                _let_through(block)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Its main output."""
        with _products_in(self.network):
            return main_output(self.blocks[""](self.model, **{**inputs, **no_cache(self.model)}))


def _products_in(network: Network) -> AbstractContextManager[object]:
    device = next(network.model.parameters()).device
    if network.products == torch.float32:
        return no_autocast(device)
    return torch.autocast(device.type, network.products, cache_enabled=False)


def _let_through(block: RoundedBlock) -> None:
    """Let calls of a block's module go through it."""
    module: Any = block.state.module
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(plain, *args, **kwargs)
        return checkpoint(block, plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = forward


def _twin(state: BlockState, target: Target, weights: bool) -> FakeLayer:
    rule, latent = target.rule, state.matrix(target).float()
    learned = (
        StraightThrough(rule.weights, WEIGHTS, None, through=True) if weights and rule.weights is not None else None
    )
    sides = [None if q is None else _straight(q) for q in (rule.inputs, rule.outputs)]
    return FakeLayer(state.float_module(target.name), latent, learned, *sides, trainable=False)


def _straight(quantizer: Quantizer) -> StraightThrough:
    """Of activations: measured on every tensor, and the gradient knows what a range costs all that share it."""
    dynamic = quantizer.replace(static=False) if quantizer.static else quantizer
    return StraightThrough(dynamic, ACTIVATIONS, None, through=True)
