"""Kinds whose modules have one matrix, a bias, and quantizers of what enters and leaves: what those share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.learned import Learned
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds._base import Kind, Quantized, Site, Stored, Target, live, module_at
from nybble.nn.kinds._lookup import matrix_at
from nybble.nn.layer import QuantLayer
from nybble.nn.layouts import Layouts
from nybble.nn.packed import Packed
from nybble.nn.swap import set_module
from nybble.nn.twin import Twin
from nybble.qtensor import QTensor


class LayerKind(Kind):
    """A layer ``f(x, W) + b`` that a child of :class:`~nybble.nn.layer.QuantLayer` stands for.

    A child says what it claims, which way round its matrix is, and makes the stand-in (:meth:`stand_in`).
    """

    sides = ("weights", "inputs", "outputs")
    refusal = "this is a layer with a weight, which has no matmuls of activations and no KV cache. Change its targets."
    shares_input = True

    @abstractmethod
    def stand_in(self, old: nn.Module, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized) -> QuantLayer:
        """What stands for ``old``.

        Args:
            old: the float module, or what the model has in its place when a file is loaded.
            weight: [out, in]; a plain tensor where weights stay in float.
            bias: [out] or None.
            made: all else.
        """

    def fits(self, module: nn.Module) -> bool:
        """Whether a stand-in of this kind may take this module's place when a file is loaded.

        A config may build a plain layer where the model that was quantized had one of another kind.
        """
        return self.claims(module)

    def put(self, root: nn.Module, target: Target, made: Quantized) -> None:
        old = root.get_submodule(target.name)
        weight = made.weights[0] if made.weights else self._dense(old)
        bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
        layer = self.stand_in(old, weight, bias, made)
        set_module(root, target.name, layer.standing_for(next(old.parameters()).dtype))

    def sites(self, target: Target, module: nn.Module) -> Iterator[Site]:
        rule, matrix = target.rule, self.matrix(module, "", live(module)).detach()
        if rule.weights is not None:
            yield Site(name="weights", quantizer=rule.weights, example=matrix)
        rows, columns = matrix.shape
        for name, quantizer, width in (("inputs", rule.inputs, columns), ("outputs", rule.outputs, rows)):
            if quantizer is not None:
                example = torch.zeros(1, 8, width, device=matrix.device)
                yield Site(name=name, quantizer=quantizer, example=example)

    def watch_sites(self, module: nn.Module, see: Callable[[str, Tensor], None]) -> Callable[[], None]:
        def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see("inputs", self.enters(module, self.reads(args, kwargs)))

        handles = (
            module.register_forward_pre_hook(enters, with_kwargs=True),
            module.register_forward_hook(lambda _, __, output: see("outputs", output)),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def put_twin(self, root: nn.Module, target: Target, learned: Mapping[str, Learned]) -> list[Twin]:
        from nybble.nn.fake import FakeLayer  # which asks kinds itself

        old = root.get_submodule(target.name)
        twin = FakeLayer(old, None, learned.get("weights"), learned.get("inputs"), learned.get("outputs"))
        set_module(root, target.name, twin)
        return [twin]

    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:
        found: dict[str, Any] = {"class": self.entry, **self.more(module)}
        if isinstance(module.weight, Packed):
            found["weight"] = layouts.number(module.weight.qtensor())
        for side in ("inputs", "outputs"):
            quantizer = getattr(module, side)
            if quantizer is not None:
                found[side] = quantizer.to_dict()
        return found

    def more(self, module: nn.Module) -> dict[str, Any]:
        """What the description of a quantized module says beside weight, inputs and outputs."""
        return {}

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:
        old = module_at(root, name, name)
        if not self.fits(old):
            raise FileError(f"{name} is described as a {self.entry}; in this model it is a {type(old).__name__}.")
        matrix = matrix_at(root, name).detach().to(next(old.parameters()).dtype)  # by the kind that it has now
        sides = {s: ActivationQuantizer.from_dict(entry[s]) if s in entry else None for s in ("inputs", "outputs")}
        weight = layouts.empty(int(entry["weight"])) if "weight" in entry else matrix
        if tuple(weight.shape) != tuple(matrix.shape):
            raise FileError(f"{name} is described as {list(weight.shape)}; this model has {list(matrix.shape)}.")
        made = Quantized(inputs=sides["inputs"], outputs=sides["outputs"], folded=str(entry.get("folded", "")))
        bias = self.empty_bias(old, matrix, entry)
        set_module(root, name, self.stand_in(old, weight, bias, made).standing_for(matrix.dtype))

    def _dense(self, module: nn.Module) -> Tensor:
        """The live matrix of a module, in the dtype that it has."""
        return self.matrix(module, "", live(module)).detach().to(next(module.parameters()).dtype)

    def empty_bias(self, old: nn.Module, matrix: Tensor, entry: dict[str, Any]) -> Tensor | None:
        """The bias that a file will fill: the one that the model's module has."""
        return old.bias if isinstance(old.bias, Tensor) else None

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:
        if "weight" in entry:
            into.weight(f"{name}.weight", weights[entry["weight"]])
        for side in ("inputs", "outputs"):
            if side in entry:
                into.activations(f"{name}.{side}", ActivationQuantizer.from_dict(entry[side]))
