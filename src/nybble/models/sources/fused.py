"""Parameters that a model keeps for all experts at once, and files for each expert: found by name, read one at a time.

What transformers would do with the whole checkpoint in memory (stack experts, the rows of gate and up one behind the
other) is done here for a parameter when it is asked for; experts that are packed stay packed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.models.sources.layouts import PackedWeight
from nybble.models.sources.match import Match
from nybble.models.sources.rows import rows_joined
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fused:
    """A parameter [experts, out, in].

    Attributes:
        shape: its own.
        pieces: for each expert the names in the files of matrices whose rows make up its matrix, in order.
    """

    shape: Shape
    pieces: tuple[tuple[str, ...], ...]

    def names(self) -> list[str]:
        """Of all pieces, in order."""
        return [name for expert in self.pieces for name in expert]

    def values(self, read: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]], dtype: torch.dtype) -> Tensor:
        """Put together; never more in memory than that and one piece.

        Args:
            read: gives the named tensors, one at a time.
            dtype: of the result.
        """
        found, done = torch.empty(self.shape, dtype=dtype), 0
        for _, piece in read(self.names()):
            expert, row = divmod(done, self.shape[1])
            found[expert, row : row + len(piece)] = piece
            done += len(piece)
        return found

    def packed(self, name: str, weights: Mapping[str, PackedWeight]) -> PackedWeight | None:
        """The parameter as one QTensor an expert, where every piece is one, and none is behind a rotation.

        Args:
            name: of the parameter.
            weights: the packed weights of the files.
        """
        found = [weights.get(piece) for piece in self.names()]
        if any(each is None or each.transposed or each.rotation is not None for each in found):
            return None
        parts: dict[str, str] = {}
        kept: dict[str, str] = {}
        for number, piece in enumerate(self.names()):
            for role, part in weights[piece].parts.items():
                parts[f"{number}.{role}"], kept[f"{number}.{role}"] = part, weights[piece].kept_as[role]
        builds = [[weights[piece].build for piece in expert] for expert in self.pieces]
        build = partial(_build, builds=builds)
        return PackedWeight(name=name, shape=self.shape, parts=parts, build=build, kept_as=kept)


def _build(
    t: Mapping[str, Tensor], *, builds: Sequence[Sequence[Callable[[Mapping[str, Tensor]], Sequence[QTensor]]]]
) -> list[QTensor]:
    of: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in t.items():
        number, _, role = name.partition(".")
        of[int(number)][role] = tensor
    numbers = iter(range(len(of)))
    return [rows_joined([build(of[next(numbers)])[0] for build in expert]) for expert in builds]


def made_of(
    model: PreTrainedModel, match: Match, expected: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> tuple[dict[str, str], dict[str, Fused]]:
    """What the missing parameters of a match are made of.

    Args:
        model: on the meta device.
        match: of its names.
        expected: its tensors.
        shapes: of what the files hold.

    Returns:
        parameter -> the tensor that it is under another name; parameter -> the matrices that make it up. One that
        transformers makes in another way, or of which a piece is missing, is in neither.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = {pattern: (rule, i) for rule in converters for i, pattern in enumerate(rule.source_patterns)}
    missing, state = set(match.missing), model.state_dict()
    direct: dict[str, str] = {}
    pieces: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for name in match.unused:
        made, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if made not in missing:
            continue
        if pattern is None:
            if tuple(expected[made].shape) == shapes[name]:
                direct.setdefault(made, name)
            continue
        rule, place = known[pattern]
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d{1,6})"), name)
        if _stacks(rule) and number is not None and number.lastindex == 1:
            pieces[made][int(number[1]), place] = name
    fused = {name: _fused(tuple(expected[name].shape), found) for name, found in pieces.items()}
    return direct, {n: f for n, f in fused.items() if f is not None and _fits(f, shapes)}


def _stacks(rule: Any) -> bool:
    """Whether a rule stacks matrices, and before that puts rows behind rows."""
    said = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    wanted = [("MergeModulelist", 0), ("Concatenate", 1)]
    return len(rule.target_patterns) == 1 and said == wanted[: 1 + (len(rule.source_patterns) > 1)]


def _fused(shape: Shape, found: Mapping[tuple[int, int], str]) -> Fused | None:
    count = 1 + max(place for _, place in found)
    if len(shape) != 3 or len(found) != count * shape[0] or any(expert >= shape[0] for expert, _ in found):
        return None
    return Fused(shape, tuple(tuple(found[e, i] for i in range(count)) for e in range(shape[0])))


def _fits(fused: Fused, shapes: Mapping[str, Shape]) -> bool:
    _, rows, columns = fused.shape
    return all(
        all(len(shapes[n]) == 2 and shapes[n][1] == columns for n in expert)
        and sum(shapes[n][0] for n in expert) == rows
        for expert in fused.pieces
    )
