"""Attentions: no weight of their own; the operands of their two products are what a scheme can quantize."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, ModelError, SchemeError
from nybble.learned import Learned
from nybble.matmul_format import OPERANDS
from nybble.nn.activation import ActivationQuantizer, check_static
from nybble.nn.attention import CACHED, MatmulQuantizers, OperandWatch, attentions, use_quantized_attention
from nybble.nn.attention import PART as MATMULS
from nybble.nn.fake_attention import FakeCache, FakeOperands, use_fake_cache
from nybble.nn.kinds import Get, Kind, Operands, Quantized, Site, Stored, Target, module_at
from nybble.nn.layouts import Layouts
from nybble.nn.twin import Twin
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

CACHES = {"keys": "key", "values": "value"}
"""Sides of a cache -> the operands that they are."""


class Attention(Kind):
    """Query times key, probabilities times value, of modules that call transformers' attention interface."""

    entry = "matmuls"
    classes = ("Attention",)
    sides = ("matmuls", "kv")
    refusal = (
        "this is an attention, which has products of activations only: matmuls, and what it caches: kv. "
        "Change the rule's targets."
    )
    stand_ins = (MatmulQuantizers,)
    operands = OPERANDS
    part = MATMULS

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return next((name for name, _ in attentions(module)), None) == ""  # the module itself comes first

    def targets(self, name: str, module: nn.Module) -> Iterator[Target]:  # noqa: D102
        yield Target(name=name, kind=self, shape=(0, 0), matrices=0)

    def check(self, target: Target, module: nn.Module) -> None:  # noqa: D102
        super().check(target, module)
        for _, quantizer in target.rule.matmuls.items() if target.rule.matmuls is not None else ():
            if not quantizer.granularity.for_products:
                raise SchemeError(
                    f"{quantizer.granularity.word} columns need a weight that takes the shifts; matmuls have none. "
                    "Write 'tensor'."
                )
            check_static(quantizer)

    def tied(self, target: Target, root: nn.Module, others: Sequence[str]) -> Target:  # noqa: D102
        return target

    def parameters(self, leaf: str) -> tuple[str, ...]:  # noqa: D102
        return ()

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        raise ModelError(f"{type(module).__name__} multiplies activations; it has no matrix.")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        raise ModelError(f"{type(module).__name__} multiplies activations; it has no matrix.")

    def watch_operands(self, module: nn.Module, see: Callable[[str, Tensor], None]) -> Callable[[], None]:  # noqa: D102
        module.add_module(MATMULS, OperandWatch(see))
        return lambda: delattr(module, MATMULS)

    def pairs(self, operands: Mapping[str, Tensor]) -> list[Operands]:
        """Of operands [sequences, heads, tokens, width]; where queries share a key, it is repeated for each."""
        groups = operands["query"].shape[1] // operands["key"].shape[1]
        flat = {
            name: (x.repeat_interleave(groups, 1) if name in ("key", "value") else x).flatten(0, 1)
            for name, x in operands.items()
        }
        value = flat["value"].mT.contiguous()
        return [
            (("query", flat["query"]), ("key", flat["key"])),
            (("probabilities", flat["probabilities"]), ("value", value)),
        ]

    def put(self, root: nn.Module, target: Target, made: Quantized) -> None:  # noqa: D102
        root.get_submodule(target.name).add_module(MATMULS, MatmulQuantizers(made.operands))

    def prepare(self, model: nn.Module) -> None:  # noqa: D102
        use_quantized_attention(model)

    def sites(self, target: Target, module: nn.Module) -> Iterator[Site]:
        """Operands, and keys and values as they are cached; the examples have a head's width, where that is known."""
        matmuls, kv, width = target.rule.matmuls, target.rule.kv, getattr(module, "head_dim", None)
        for operand, quantizer in matmuls.items() if matmuls is not None else ():
            example = _example(quantizer, None if operand == "probabilities" else width)
            yield Site(name=f"matmuls.{operand}", quantizer=quantizer, example=example)
        for name in CACHES:
            stored = None if kv is None else getattr(kv, name)
            if stored is not None:
                yield Site(name=f"kv.{name}", quantizer=stored, example=_example(stored, width))

    def watch_sites(self, module: nn.Module, see: Callable[[str, Tensor], None]) -> Callable[[], None]:
        """Operands under their names, keys and values also as what is cached."""

        def look(operand: str, x: Tensor) -> None:
            see(f"matmuls.{operand}", x)
            for name, cached in CACHES.items():
                if cached == operand:
                    see(f"kv.{name}", x)

        return self.watch_operands(module, look)

    def put_twin(self, root: nn.Module, target: Target, learned: Mapping[str, Learned]) -> list[Twin]:
        """One for the products, one for the cache."""
        module, made = root.get_submodule(target.name), dict[str, Twin]()
        if target.rule.matmuls is not None:
            made[MATMULS] = FakeOperands({operand: learned[f"matmuls.{operand}"] for operand in OPERANDS})
        if target.rule.kv is not None:
            parts = {name: part for name in CACHES if (part := learned.get(f"kv.{name}")) is not None}
            made[CACHED] = FakeCache(target.rule.kv, parts)
        for name, twin in made.items():
            if name in module._modules:
                raise SchemeError(f"it has {name} that are quantized, or trained, already. Begin with the float model.")
            module.add_module(name, twin)
        return [*made.values()]

    def prepare_twins(self, model: nn.Module, targets: Sequence[Target]) -> None:  # noqa: D102
        if any(target.rule.matmuls is not None for target in targets):
            use_quantized_attention(model)
        else:
            use_fake_cache(model)

    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, MatmulQuantizers)
        return {"class": self.entry, "operands": module.to_dict()}

    def holder(self, name: str) -> str:  # noqa: D102
        return name.rpartition(".")[0]

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        module = module_at(root, self.holder(name), name)
        if not name.endswith(f".{MATMULS}"):
            raise FileError(f"{name} is described as an attention's {MATMULS}, which has another name.")
        module.add_module(MATMULS, MatmulQuantizers.from_dict(entry["operands"]))

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:  # noqa: D102
        for operand, quantizer in entry["operands"].items():
            into.activations(f"{name}.{operand}", ActivationQuantizer.from_dict(quantizer))


def _example(quantizer: Quantizer, width: int | None) -> Tensor:
    """Zeros [1, 1, tokens, width] that a granularity can judge by; of any width where that isn't known."""
    own = math.prod(int(number) for number in re.findall(r"\d+", str(quantizer.granularity)))
    return torch.zeros(1, 1, own, width if isinstance(width, int) else own)


PART = Attention()
