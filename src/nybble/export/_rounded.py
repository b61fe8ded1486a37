"""A quantized model some of whose weights are rounded again to what a target holds, or told in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import FileError
from nybble.core.tensorfile import Planned, safetensors_name
from nybble.core.tensorheader import TensorEntry
from nybble.export._recodings import Recoding, seen_by
from nybble.export._source import Layer, Source
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds.tied import input_table
from nybble.qtensor import QTensor
from nybble.qtensor._rows import split_rows
from nybble.quantizer import Quantizer
from nybble.scheme import shares_over_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = 2
"""Groups whose rounded weights stay in memory: a file has the names of two that belong together side by side."""


class RoundedSource(Source):
    """Another source, with some weights in other quantizers.

    Args:
        source: what is rounded.
        quantizers: layer -> its new one; others keep every code.
        together: last parts of the names of siblings that share what a quantizer has for a whole tensor
            (:attr:`nybble.scheme.Scheme.together`).
        recodings: layer -> how its codes are told in other words.
        unpacked: embeddings that are in float from here on, in the model's dtype; heads that read them follow.

    Attributes:
        quantizers, recodings, unpacked: as given. notes: of the source.
    """

    def __init__(
        self,
        source: Source,
        quantizers: Mapping[str, Quantizer],
        together: Sequence[Sequence[str]] = (),
        recodings: Mapping[str, Recoding] = MappingProxyType({}),
        unpacked: Sequence[str] = (),
    ) -> None:
        self._source, self.quantizers, self.recodings = source, dict(quantizers), dict(recodings)
        self.place, self.title, self.config = source.place, source.title, source.config
        self.kv, self.notes, self.unpacked = source.kv, source.notes, tuple(unpacked)
        self._tables = {f"{name}.weight": source.layers[name] for name in unpacked}
        self.floats = {**source.floats, **{name: self._entry(layer) for name, layer in self._tables.items()}}
        self._changed = {*self.quantizers, *self.recodings}
        self.layers = {n: self._layer(layer) for n, layer in source.layers.items() if not self._in_float(layer)}
        self._names = {prefix: name for name, layer in self.layers.items() for prefix in layer.weights}
        self._groups = _groups(quantizers, together)
        self._made: dict[tuple[str, ...], dict[str, list[QTensor]]] = {}
        self._last: tuple[tuple[str, str], QTensor] | None = None
        self._errors: dict[str, float] = {}

    def _in_float(self, layer: Layer) -> bool:
        if not layer.kind.reads_another or not self.unpacked:
            return layer.name in self.unpacked
        named = str(layer.entry.get("table", ""))
        return (named or input_table(self._source.skeleton())) in self.unpacked

    def _entry(self, layer: Layer) -> TensorEntry:
        (weight,) = layer.weights.values()
        rows, columns = weight.shape
        size = rows * columns * self.dtype.itemsize
        return TensorEntry(dtype=str(safetensors_name(self.dtype)), shape=(rows, columns), begin=0, nbytes=size)

    def _table(self, name: str) -> Tensor:
        layer = self._tables[name]
        (prefix,) = layer.weights
        wide = self._source.weight(layer, prefix).dequantize()
        found = wide.to(self.dtype)
        self._errors[layer.name] = relative_error(wide, found.float(), None)
        return found

    def _layer(self, layer: Layer) -> Layer:
        quantizer, recoding = self.quantizers.get(layer.name), self.recodings.get(layer.name)
        if quantizer is not None:
            empty = {
                prefix: quantizer.quantize(torch.empty(weight.shape, device="meta"))
                for prefix, weight in layer.weights.items()
            }
            return replace(layer, weights=empty)
        if recoding is None:
            return layer
        made = {prefix: self._recoded(recoding, layer, prefix).to("meta") for prefix in layer.weights}
        return replace(layer, weights=made)

    def _recoded(self, recoding: Recoding, layer: Layer, prefix: str, seen: bool = False) -> QTensor:
        """Of a layer of the source; ``seen``: with its numbers, which some have to see to know what comes of it."""
        given = self._source.weight(layer, prefix) if seen else seen_by(recoding, self._source, layer, prefix)
        found = recoding.make(given)
        if found is None:
            raise FileError(f"{self.place}: {prefix} is not {recoding.words}.")
        return found

    def skeleton(self) -> PreTrainedModel:
        return self._source.skeleton()

    def weight(self, layer: Layer, prefix: str) -> QTensor:
        if layer.name in self.recodings:
            return self._again(layer, prefix)
        if layer.name not in self.quantizers:
            return self._source.weight(layer, prefix)
        group = self._groups[layer.name]
        if group not in self._made:
            while len(self._made) >= _KEPT:
                del self._made[next(iter(self._made))]
            self._made[group] = self._rounded(group)
        return self._made[group][layer.name][list(layer.weights).index(prefix)]

    def scales(self, layer: Layer, prefix: str) -> QTensor:
        return self.weight(layer, prefix) if layer.name in self._changed else self._source.scales(layer, prefix)

    def _again(self, layer: Layer, prefix: str) -> QTensor:
        """A weight in other words; the last one is kept."""
        key = (layer.name, prefix)
        if self._last is None or self._last[0] != key:
            own = self._source.layers[layer.name]
            self._last = (key, self._recoded(self.recodings[layer.name], own, prefix, seen=True))
        return self._last[1]

    @property
    def errors(self) -> dict[str, float]:
        """Layer -> ``|W - W'|^2 / |W|^2`` of W as it was; those told in other words are read for it."""
        for name in self.recodings.keys() - self._errors.keys():
            own = self._source.layers[name]
            self._errors[name] = max((self._error(own, prefix) for prefix in own.weights), default=0.0)
        return self._errors

    def _error(self, own: Layer, prefix: str) -> float:
        recoding = self.recodings[own.name]
        if recoding.looks and not recoding.rounds:
            return 0.0  # the same values
        before, after = self._source.weight(own, prefix), self._recoded(recoding, own, prefix, seen=True)
        return relative_error(before.dequantize(), after.dequantize(), None)

    def _kept(self, name: str, prefix: str, part: str) -> bool:
        """Whether a tensor of a weight in other words is the source's own."""
        recoding = self.recodings.get(name)
        if recoding is None or recoding.looks == "all":
            return False
        own = self._source.layers[name].weights[prefix].tensors()
        return own.get(part) is self.layers[name].weights[prefix].tensors()[part]

    def _rounded(self, group: tuple[str, ...]) -> dict[str, list[QTensor]]:
        quantizer = self.quantizers[group[0]]
        before = {name: self._values(name) for name in group}
        found: dict[str, list[QTensor]]
        if len(group) == 1:
            found = {group[0]: [quantizer.quantize(matrix) for matrix in before[group[0]]]}
        else:
            matrices = [matrix for name in group for matrix in before[name]]
            whole = quantizer.quantize(torch.cat(matrices))
            parts = split_rows(whole, [len(matrix) for matrix in matrices])
            found = {name: [part] for name, part in zip(group, parts, strict=True)}
        for name, parts in found.items():
            pairs = zip(before[name], parts, strict=True)
            self._errors[name] = relative_error(
                torch.cat(before[name]), torch.cat([part.dequantize() for _, part in pairs]), None
            )
        return found

    def _values(self, name: str) -> list[Tensor]:
        layer = self._source.layers[name]
        found = [self._source.weight(layer, prefix).dequantize() for prefix in layer.weights]
        if not all(bool(matrix.isfinite().all()) for matrix in found):
            raise FileError(f"{self.place}: {name} holds NaN or Inf, which can't be rounded again.")
        return found

    def _held(self, name: str) -> tuple[Layer, str, str] | None:
        """Of a tensor of a weight that is rounded: its layer, prefix, and which of its tensors it is."""
        for at in reversed([i for i, letter in enumerate(name) if letter == "."]):
            owner = self._names.get(name[:at])
            if owner is not None:
                return (self.layers[owner], name[:at], name[at + 1 :]) if owner in self._changed else None
        return None

    def copied(self, name: str) -> Planned:
        if name in self._tables:
            entry, made = self.floats[name], partial(self._table, name)
            return Planned(dtype=entry.dtype, shape=entry.shape, bytes_from=made, raw=True)
        held = None if name in self.floats else self._held(name)
        if held is None:
            return self._source.copied(name)
        layer, prefix, part = held
        if self._kept(layer.name, prefix, part):
            return self._source.copied(name)
        empty = layer.weights[prefix].tensors()[part]
        made = partial(self.tensor, name)
        return Planned(dtype=str(safetensors_name(empty.dtype)), shape=tuple(empty.shape), bytes_from=made, raw=True)

    def filed(self, layer: Layer, prefix: str, form: str, role: str) -> Planned | None:
        kept = layer.name not in self._changed
        return self._source.filed(self._source.layers[layer.name], prefix, form, role) if kept else None

    def blocks(self, layer: Layer, kind: str, turned: bool) -> tuple[Path, int, int] | None:
        kept = layer.name not in self._changed
        return self._source.blocks(self._source.layers[layer.name], kind, turned) if kept else None

    def tensor(self, name: str) -> Tensor:
        if name in self._tables:
            return self._table(name)
        held = None if name in self.floats else self._held(name)
        if held is None or self._kept(held[0].name, held[1], held[2]):
            return self._source.tensor(name)
        layer, prefix, part = held
        recoding = self.recodings.get(layer.name)
        if recoding is not None and recoding.looks != "all" and part != "codes":
            found = recoding.make(self._source.scales(self._source.layers[layer.name], prefix))
            assert found is not None  # as it was without its numbers
            return found.tensors()[part]
        return self.weight(layer, prefix).tensors()[part]

    def activation(self, layer: Layer, side: str) -> ActivationQuantizer | None:
        return self._source.activation(layer, side)

    def side_files(self) -> Mapping[str, Path]:
        return self._source.side_files()


def _groups(quantizers: Mapping[str, Quantizer], together: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Each layer with those that are rounded as one matrix with it."""
    groups: dict[object, list[str]] = {}
    for name, quantizer in quantizers.items():
        parent, _, leaf = name.rpartition(".")
        number = next((i for i, names in enumerate(together) if leaf in names), None)
        alone = number is None or not shares_over_rows(quantizer)
        groups.setdefault(name if alone else (parent, number, quantizer), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}
