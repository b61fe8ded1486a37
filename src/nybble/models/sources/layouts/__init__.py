"""How others' quantized checkpoints are laid out: which tensors make which weight, as a QTensor. One layout a file.

A file's name is the ``quant_method`` of config.json that it reads (``compressed_tensors.py``: compressed-tensors); it
defines ``PART``, a :class:`Layout`. Other packages add theirs through entry points of the group
``nybble.models.sources.layouts``. What a layout gives is exact: the values are those of the library that wrote the
file, to the last bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError, NybbleError
from nybble.core.guard import reading
from nybble.core.tensorheader import TensorEntry
from nybble.models.named import LAYOUTS
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from nybble.models.sources.layouts._ct_rotations import Rotation
    from nybble.models.sources.layouts._rounded import Rounded

SMALL = 1 << 16
"""Bytes of a tensor that may be read before a model is accepted: a shape, a record of JSON."""
FLOATS = ("F32", "F16", "BF16")
DECIDING = ("g_idx", "weight_g_idx", "quant_map", "nested_quant_map")
"""Roles whose numbers decide what a weight is: an order of columns, a table that is a format's own or not."""


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A parameter of the float model that is kept in several tensors of the files.

    Attributes:
        name: of the parameter, as the files would call it. shape: its own.
        parts: role in :attr:`build` -> name in the files.
        build: from those tensors, in memory, to the QTensors [out, in] that it is made of: one, or one an expert.
        kept_as: role -> codes, scales, offsets or tables, as a report counts them.
        transposed: whether the parameter is [..., in, out].
        form: what the library calls this way of keeping it, where others of its files may hold the same bytes.
        rotation: of the input while the model runs; the matrix is that of the rotated input. None: there is none.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    build: Callable[[Mapping[str, Tensor]], Sequence[QTensor]]
    kept_as: Mapping[str, str]
    transposed: bool = False
    form: str = ""
    rotation: Rotation | None = None

    def made(self, read: Callable[[str], Tensor]) -> Sequence[QTensor]:
        """Read and checked.

        Raises:
            FileError: a number in the files that can't be meant.
        """
        tensors = {role: read(name).contiguous() for role, name in self.parts.items()}
        try:
            with reading(self.name):
                return self.build(tensors)
        except NybbleError as error:
            raise FileError(f"{self.name}: {error}") from error

    def described(self, empty: Callable[[str], Tensor], read: Callable[[str], Tensor]) -> Sequence[QTensor]:
        """What :meth:`made` gives, on the meta device.

        Args:
            empty: gives any tensor on the meta device.
            read: gives its numbers, for the few that decide the form.

        Raises:
            FileError: as :meth:`made`.
        """
        tensors = {
            role: (read if role.rpartition(".")[2] in DECIDING else empty)(name).contiguous()
            for role, name in self.parts.items()
        }
        try:
            found = self.build(tensors)
        except NybbleError as error:
            raise FileError(f"{self.name}: {error}") from error
        except (RuntimeError, LookupError, TypeError, ValueError):  # asks a tensor without numbers for one
            found = self.made(read)
        return [part.to("meta") for part in found]

    def values(self, read: Callable[[str], Tensor]) -> Tensor:
        """float32, of :attr:`shape`: of the input as it comes."""
        found = [part.dequantize() for part in self.made(read)]
        whole = found[0] if len(self.shape) == 2 else torch.stack(found)
        if self.rotation is not None:
            whole = self.rotation.made(read)(whole, back=True)
        return whole.mT.contiguous() if self.transposed else whole


@dataclass(frozen=True)
class Files:
    """What a checkpoint holds, and ways to refuse what it doesn't.

    Attributes:
        place: what it is called. entries: name -> entry of a safetensors header. read: gives a tensor.
    """

    place: str
    entries: Mapping[str, TensorEntry]
    read: Callable[[str], Tensor] = field(repr=False)

    def need(self, name: str, dtypes: Sequence[str], shape: Sequence[int] | None = None) -> TensorEntry:
        """The entry of a tensor that must be there.

        Args:
            name: of the tensor.
            dtypes: safetensors names that it may have.
            shape: that it must have; None: any.

        Raises:
            FileError: it is missing, or something else.
        """
        entry = self.entries.get(name)
        wanted = f"{' or '.join(dtypes)}{'' if shape is None else f' {list(shape)}'}"
        if entry is None:
            raise FileError(f"{self.place} lacks {name}, which config.json asks for ({wanted}).")
        if entry.dtype not in dtypes or (shape is not None and tuple(entry.shape) != tuple(shape)):
            raise FileError(f"{self.place}: {name} is {entry.dtype} {list(entry.shape)}; it should be {wanted}.")
        return entry

    def matrix(self, name: str, dtypes: Sequence[str]) -> tuple[int, int]:
        """The shape of a matrix that must be there; raises as :meth:`need`, or where a side is 0."""
        shape = self.need(name, dtypes).shape
        if len(shape) != 2 or not all(shape):
            raise FileError(f"{self.place}: {name} has shape {list(shape)}; a matrix is needed.")
        return shape[0], shape[1]

    def any_of(self, name: str, dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> TensorEntry:
        """As :meth:`need`, of several shapes."""
        entry = self.need(name, dtypes)
        if tuple(entry.shape) not in {tuple(shape) for shape in shapes}:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise FileError(f"{self.place}: {name} is {entry.dtype} {list(entry.shape)}; it should be {wanted}.")
        return entry

    def small(self, name: str) -> Tensor:
        """A tensor of a few bytes, read now.

        Raises:
            FileError: it is larger than that.
        """
        if self.entries[name].nbytes > SMALL:
            raise FileError(f"{self.place}: {name} has {self.entries[name].nbytes} bytes, which no description has.")
        return self.read(name)

    def ending(self, leaf: str) -> list[str]:
        """Names of the modules that have a tensor of this name, in order."""
        return [name.removesuffix(f".{leaf}") for name in self.entries if name.endswith(f".{leaf}")]


class Layout(ABC):
    """What one library's checkpoints look like."""

    @abstractmethod
    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:
        """The packed weights of a checkpoint; nothing but descriptions is read.

        Args:
            config: ``quantization_config``, from a file that may say anything: KeyError, TypeError and the like are
                reported as malformed.
            files: what is there.

        Raises:
            FileError: tensors are missing, or contradict each other or the config. ModelError: a kind of checkpoint
                that has no QTensor.
        """

    def in_float(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint of this config may have no packed weight at all."""
        return False

    def rounded(self, config: Mapping[str, Any], files: Files, modules: Sequence[str]) -> Rounded:
        """What else is to be rounded: activations, the KV cache.

        Args:
            config: as for :meth:`weights`.
            files: likewise.
            modules: names of those with packed weights.

        Raises:
            FileError: tensors that should say how are missing, or contradict the config.
        """
        from nybble.models.sources.layouts._rounded import Rounded

        return Rounded()


def packed_weights(config: Any, files: Files) -> tuple[dict[str, PackedWeight], Rounded]:
    """The packed weights of a checkpoint whose ``quantization_config`` says ``config``, by name; what else is rounded.

    Raises:
        FileError: malformed, or tensors that are missing or contradict it. ModelError: none of the known layouts.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in LAYOUTS:
        raise ModelError(f"{files.place} is quantized by {method!r:.60}; known: {', '.join(LAYOUTS.names())}.")
    layout: Layout = LAYOUTS.get(method)
    found: dict[str, PackedWeight] = {}
    with reading(f"the {method} checkpoint {files.place}"):
        for weight in layout.weights(config, files):
            if weight.name in files.entries and weight.name not in weight.parts.values():
                raise FileError(f"{files.place} has {weight.name} twice, packed and in float.")
            found[weight.name] = weight
        if not found and not layout.in_float(config):
            raise FileError(
                f"{files.place}: config.json says that it is quantized by {method}, and it has none of the tensors of "
                "such a model. If its weights are in float, take quantization_config out of config.json."
            )
        modules = [name.removesuffix(".weight") for name in found]
        return found, layout.rounded(config, files, modules)


def whole(value: Any, low: int, high: int, what: str) -> int:
    """An integer of a config.

    Raises:
        FileError: it is none, or out of range.
    """
    if type(value) is not int or not low <= value <= high:
        raise FileError(f"{what} is {value!r:.40}; a whole number from {low} to {high} is needed.")
    return value


def words(count: int, bits: int) -> int:
    """32-bit words that a stream of codes takes."""
    return math.ceil(count * bits / 32)
