"""``transform_config`` of compressed-tensors: which inputs a checkpoint rotates while the model runs, and by what.

What a scheme says of weights (``weight_input``, ``weight_output``) is done in the files. Of what is done at run time
the inputs of layers are nybble's; outputs, queries and keys are refused. A scheme's matrix is stored times sqrt(n), one
for all modules of one size, under the first of them; a plain Hadamard matrix of a power of two needs none.
Source: compressed-tensors 0.20 (``transform/``); tests read what llm-compressor writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError
from nybble.core.orthogonal import hadamard_signs
from nybble.models.sources.layouts import FLOATS, Files
from nybble.models.sources.layouts._patterns import is_class, named
from nybble.nn.rotation import BlockRotation

KEY = "transform_config"
_OFFLINE = ("weight_input", "weight_output")
_TYPES = ("hadamard", "random-hadamard")


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Of a module's input.

    Attributes:
        block: channels that are rotated among themselves. stored: name of the matrix, times sqrt(block); empty of
            Sylvester's. inverse: whether its transpose is meant.
    """

    block: int
    stored: str = ""
    inverse: bool = False

    def made(self, read: Callable[[str], Tensor]) -> BlockRotation:
        """As a module.

        Raises:
            FileError: the matrix is not orthogonal.
        """
        if not self.stored:
            return BlockRotation(self.block)
        wide = read(self.stored).double()
        wide = wide.T if self.inverse else wide
        signs = _signs(wide)
        if signs is not None:
            return BlockRotation(self.block, None if bool((signs > 0).all()) else signs)
        found = BlockRotation(self.block, matrix=(wide / self.block**0.5).float().contiguous())
        try:
            found.validate()
        except FileError as error:
            raise FileError(f"{self.stored}: {error}") from error
        return found


def _signs(wide: Tensor) -> Tensor | None:
    """Signs of the rows, int8 [n], where that is all that tells a matrix from the Hadamard matrix known here."""
    if hadamard_signs(len(wide)) is None:
        return None
    ratio = wide * BlockRotation(len(wide)).basis().sign().double()
    alike = bool((ratio == ratio[:, :1]).all() and (ratio.abs() == 1).all())
    return ratio[:, 0].to(torch.int8) if alike else None


@dataclass(frozen=True, kw_only=True)
class _Scheme:
    """What is done at run time: arguments of the config, checked."""

    name: str
    plain: bool
    head_dim: int | None
    targets: list[str]
    ignore: list[str]
    inverse: bool

    def takes(self, module: str, by_class: bool) -> bool:
        """Whether a module is meant; ``by_class``: it is of the class that targets name."""
        if any(named(module, each) for each in self.ignore):
            return False
        return any(named(module, t) or (by_class and is_class(t)) for t in self.targets)


class Rotations:
    """All of a checkpoint.

    Args:
        config: ``quantization_config``, from a file that may say anything.
        files: what is there.

    Attributes:
        matrices: names of the tensors that are theirs.

    Raises:
        ModelError: it asks for what nybble can't do at run time. FileError: malformed.
    """

    def __init__(self, config: Mapping[str, Any], files: Files) -> None:
        self._files = files
        stated = config.get(KEY) or {}
        groups = stated.get("config_groups") or {} if isinstance(stated, Mapping) else stated
        if not isinstance(groups, Mapping):
            raise FileError(f"{files.place}: {KEY} is {stated!r:.40}; a mapping with config_groups is needed.")
        self._schemes = list(_schemes(groups, files.place))
        endings = tuple(f".{name}_input.weight" for name in {scheme.name for scheme in self._schemes})
        self.matrices = [name for name in files.entries if endings and name.endswith(endings)]

    def of(self, module: str, columns: int) -> Rotation | None:
        """Of a module with packed weights.

        Raises:
            ModelError: several at once. FileError: a block that doesn't divide its channels, a matrix that is missing.
        """
        found = [scheme for scheme in self._schemes if scheme.takes(module, by_class=True)]
        if len(found) > 1:
            raise ModelError(f"{self._files.place} rotates the input of {module} more than once, which nybble doesn't.")
        if not found:
            return None
        (scheme,) = found
        block = scheme.head_dim or columns
        if columns % block:
            raise FileError(f"{self._files.place}: {module} has {columns} channels, not blocks of {block} ({KEY}).")
        if scheme.plain:
            if block & (block - 1):
                raise FileError(f"{self._files.place}: no Hadamard matrix of order {block} for {module} ({KEY}).")
            return Rotation(block=block)
        ending, shape = f".{scheme.name}_input.weight", (block, block)
        fitting = [n for n in self.matrices if n.endswith(ending) and tuple(self._files.entries[n].shape) == shape]
        own = f"{module}{ending}"
        name = own if own in fitting or not fitting else fitting[0]
        self._files.need(name, (*FLOATS, "F64"), shape)
        return Rotation(block=block, stored=name, inverse=scheme.inverse)

    def check_float(self, packed: set[str], ignored: list[str]) -> None:
        """Refuse a rotation of a layer whose weight is in float.

        Args:
            packed: modules whose weights are packed.
            ignored: what the quantization leaves in float, as the config has it.

        Raises:
            ModelError: there is one.
        """
        for name, entry in self._files.entries.items():
            module = name.removesuffix(".weight")
            if module in packed or module == name or len(entry.shape) != 2 or name in self.matrices:
                continue
            layer = any(named(module, each) for each in ignored)  # else it may be a table
            if any(scheme.takes(module, by_class=layer) for scheme in self._schemes):
                raise ModelError(
                    f"{self._files.place} rotates the input of {module}, whose weight is in float ({KEY}); nybble "
                    "rotates inputs of quantized layers alone. Take a checkpoint without, or the float model."
                )


def _applied(group: Any, at: str) -> list[Mapping[str, Any]]:
    """Where a group's transform goes: a list of its ``apply``, checked as far as all of them need.

    Raises:
        FileError: what compressed-tensors' schema asks for is not there.
    """
    places = group.get("apply") if isinstance(group, Mapping) else None
    if not isinstance(places, list) or not all(isinstance(args, Mapping) for args in places):
        raise FileError(
            f"{at} has apply {places!r:.40}; a list of location and targets is needed, as its library writes."
        )
    for args in places:
        if not isinstance(args.get("location"), str):
            raise FileError(f"{at} applies to location {args.get('location')!r:.40}; a word such as 'input' is needed.")
        if not isinstance(args.get("targets"), list):
            raise FileError(f"{at} has targets {args.get('targets')!r:.40}; a list of modules is needed.")
    if not isinstance(group.get("type"), str):
        raise FileError(f"{at} has type {group.get('type')!r:.40}; one of {', '.join(_TYPES)} is needed.")
    return places


def _schemes(groups: Mapping[str, Any], place: str) -> Iterator[_Scheme]:
    """What is done at run time."""
    for name, group in groups.items():
        at = f"{place}: {KEY}, group {name!s:.40}"
        for args in _applied(group, at):
            where = args["location"]
            if where in _OFFLINE:
                continue
            kind, random = group["type"], group.get("randomize", False)
            if where != "input" or kind not in _TYPES or random:
                came = f"{where!s:.40} by {kind!s:.40}{', each module its own' if random else ''}"
                raise ModelError(
                    f"{place} transforms {came} while it runs ({KEY}: {name!s:.40}); nybble rotates inputs of layers, "
                    f"by {' or '.join(_TYPES)}. Take a checkpoint without, or the float model."
                )
            head = group.get("head_dim")
            if head is not None and (type(head) is not int or not 1 <= head <= 1 << 20):
                raise FileError(f"{place}: {KEY} has head_dim {head!r:.40}; a number of channels is needed.")
            yield _Scheme(
                name=str(name), plain=kind == "hadamard", head_dim=head, inverse=bool(args.get("inverse", False)),
                targets=[str(t) for t in args["targets"]], ignore=[str(t) for t in args.get("ignore") or ()],
            )  # fmt: skip
