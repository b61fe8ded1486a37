"""Fused mixture-of-experts weights: one 3-D parameter for all experts, so no ``nn.Linear`` to look for.

Transformers 5 keeps ``gate_up_proj`` ``[experts, 2 * inner, hidden]`` and ``down_proj`` ``[experts, hidden, inner]``
(or both the other way round) in one module called as ``experts(hidden, top_k_index, top_k_weights)``. Each parameter is
a target, each expert's part of it a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.learned import Learned
from nybble.nn.experts import IMPLEMENTATION, PackedExperts, run_experts
from nybble.nn.fake_experts import FakeExperts
from nybble.nn.kinds import Get, Kind, Quantized, Site, Stored, Target, module_at
from nybble.nn.layouts import Layouts
from nybble.nn.packed import Packed
from nybble.nn.routing import DOWN, IN_NAMES, is_experts, is_transposed, routed_inputs, takes_routing
from nybble.nn.twin import Twin
from nybble.qtensor import QTensor


class Experts(Kind):
    """``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of a module of experts."""

    entry = "experts"
    classes = ("Experts", "Linear")
    sides = ("weights",)
    refusal = (
        "fused experts take quantized weights only, and this rule quantizes activations. Give them a rule of their own "
        "before it (targets: [Experts]), or leave them in float (--ignore Experts)."
    )
    stand_ins = (PackedExperts,)
    fused = True

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return is_experts(module) and takes_routing(module)

    def resembles(self, module: nn.Module) -> bool:  # noqa: D102
        return is_experts(module)

    def targets(self, name: str, module: nn.Module) -> Iterator[Target]:
        """One a fused parameter, the one that reads the hidden states first.

        Raises:
            ModelError: a 3-D weight whose place in the computation isn't known.
        """
        leaves = [leaf for leaf, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
        for leaf in sorted(leaves, key=lambda leaf: leaf == DOWN):
            if leaf not in (*IN_NAMES, DOWN):
                raise ModelError(
                    f"{type(module).__name__} has a 3-D weight {leaf!r} that nybble doesn't know how to feed."
                )
            count, rows, columns = self.matrix(module, leaf, module.get_parameter).shape
            full = f"{name}.{leaf}" if name else leaf
            yield Target(name=full, kind=self, shape=(rows, columns), leaf=leaf, matrices=count)

    def parameters(self, leaf: str) -> tuple[str, ...]:  # noqa: D102
        return (leaf,)

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get(leaf).mT if is_transposed(module) else get(leaf)

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {leaf: matrix.mT if is_transposed(module) else matrix}

    def routed(  # noqa: D102
        self, module: nn.Module, leaf: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        hidden, index, gates = (*args, *kwargs.values())[:3]
        for found in routed_inputs(module, hidden.reshape(-1, hidden.shape[-1]), index, gates):
            yield found.expert, found.inner if leaf == DOWN else found.hidden

    def put(self, root: nn.Module, target: Target, made: Quantized) -> None:  # noqa: D102
        if made.weights:
            module = root.get_submodule(target.module)
            _put(module, target.leaf, made.weights, module.get_parameter(target.leaf).dtype, is_transposed(module))

    def sites(self, target: Target, module: nn.Module) -> Iterator[Site]:
        """One an expert."""
        quantizer = target.rule.weights
        for expert, matrix in enumerate(self.matrix(module, target.leaf, module.get_parameter).detach()):
            if quantizer is not None:
                yield Site(name=f"weights.{expert}", quantizer=quantizer, example=matrix)

    def put_twin(self, root: nn.Module, target: Target, learned: Mapping[str, Learned]) -> list[Twin]:  # noqa: D102
        module = root.get_submodule(target.module)
        matrices = self.matrix(module, target.leaf, module.get_parameter)
        parts = [learned[f"weights.{expert}"] for expert in range(target.matrices)]
        twin = FakeExperts(matrices, parts, transposed=is_transposed(module))
        del module._parameters[target.leaf]
        module.add_module(target.leaf, twin)
        return [twin]

    def prepare(self, model: nn.Module) -> None:
        """Let the layers take their matrices one expert at a time, as packed experts give them."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
        config: Any = model.config
        for part in (config, config.get_text_config()):
            part._experts_implementation = IMPLEMENTATION

    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, PackedExperts)
        numbers = [layouts.number(packed.qtensor()) for packed in module.experts if isinstance(packed, Packed)]
        return {"class": self.entry, "weights": numbers, "transposed": module.transposed}

    def holder(self, name: str) -> str:  # noqa: D102
        return name.rpartition(".")[0]

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        path, _, leaf = name.rpartition(".")
        module = module_at(root, path, name)
        experts = [layouts.empty(int(number)) for number in entry["weights"]]
        _put(module, leaf, experts, getattr(module, leaf).dtype, bool(entry["transposed"]))

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:  # noqa: D102
        for expert, number in enumerate(entry["weights"]):
            into.weight(f"{name}.experts.{expert}", weights[number])


def _put(module: nn.Module, leaf: str, experts: Sequence[QTensor], dtype: Any, transposed: bool) -> None:
    del module._parameters[leaf]
    module.add_module(leaf, PackedExperts(experts, dtype, transposed=transposed, owner=module))


PART = Experts()
