"""What a checkpoint calls the tensors of a model: transformers renames, joins and permutes them while it loads.

Other runtimes read the names that came before that. transformers' own table is run backwards; nothing is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.errors import ModelError
from nybble.core.guard import reading
from nybble.core.tensorfile import Planned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_KEPT = "_nybble_kept_names"  # in a skeleton's __dict__


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a matrix under a name of their own: ``experts.3.gate_proj.weight``.

    Attributes:
        name: of the tensor in a checkpoint. matrix: number of the matrix in its parameter.
        rows: which of its rows; None: all, in order.
    """

    name: str
    matrix: int
    rows: tuple[int, ...] | None


def in_checkpoint(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, by name in it, as its checkpoints have them.

    Args:
        model: may be on the meta device.
        tensors: all that are joined with each other.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with reading("the names of this model's checkpoint", ModelError):
        _know_conversions(model)
        found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def _know_conversions(model: Any) -> None:
    """Let transformers look up once what it would look up for every tensor; a prefix is no part of a family's names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if getattr(model, "_weight_conversions", None) is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [one for one in known if not isinstance(one, PrefixChange)]


def kept_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Matrices that a checkpoint has as the model has them: name in it -> name there. Worked out once for a model.

    Args:
        model: may be on the meta device; nobody changes it.
    """
    known: Mapping[str, str] | None = vars(model).get(_KEPT)
    if known is None:
        matrices = {name: tensor.detach() for name, tensor in model.state_dict().items() if tensor.dim() == 2}
        names = {id(tensor): name for name, tensor in matrices.items()}
        try:
            stored = in_checkpoint(model, matrices)
        except ModelError:  # of matrices that are joined with vectors, say
            stored = {}
        known = {names[id(tensor)]: out for out, tensor in stored.items() if id(tensor) in names}
        vars(model)[_KEPT] = known
    return known


def parts_of(model: PreTrainedModel, name: str, matrices: int, rows: int, transposed: bool) -> list[Part]:
    """Where the rows of a parameter's matrices go: a fused parameter of experts becomes two tensors an expert.

    Args:
        model: may be on the meta device.
        name: of the parameter.
        matrices: how many it has; 0 of a plain matrix.
        rows: of each.
        transposed: whether the parameter has each matrix as [in, out].

    Raises:
        ModelError: a checkpoint joins it with others, or cuts across rows.
    """
    if not matrices and (kept := kept_names(model).get(name)) is not None:
        return [Part(name=kept, matrix=0, rows=None)]
    numbers = torch.arange(max(1, matrices) * rows, dtype=torch.int64)
    shape = (rows, 1) if not matrices else (matrices, 1, rows) if transposed else (matrices, rows, 1)
    found = in_checkpoint(model, {name: numbers.view(shape)})
    parts: list[Part] = []
    for stored, ids in found.items():
        if ids.dim() > 2:  # as it came: no family of transformers cuts it
            flat = ids.reshape(-1, rows)
            parts += [Part(name=stored, matrix=int(row[0]) // rows, rows=None) for row in flat]
            continue
        owner = ids.flatten() // rows
        if int(owner.min()) != int(owner.max()):
            raise ModelError(f"{stored} is made of several matrices of {name}.")
        taken = tuple((ids.flatten() % rows).tolist())
        whole = taken == tuple(range(rows))
        parts.append(Part(name=stored, matrix=int(owner[0]), rows=None if whole else taken))
    return parts


def as_stored(
    model: PreTrainedModel, tensors: Mapping[str, Planned], read: Callable[[str], Tensor]
) -> dict[str, Planned]:
    """Tensors of a model under the names and in the form that its checkpoints have.

    Args:
        model: on the meta device.
        tensors: by name in the model.
        read: gives one of them; only those that are joined, cut or permuted are read, when their turn comes.
    """
    empty = {name: torch.empty(plan.shape, device="meta") for name, plan in tensors.items()}
    known = {id(tensor): name for name, tensor in empty.items()}
    stored = in_checkpoint(model, empty)
    found = {out: tensors[known[id(tensor)]] for out, tensor in stored.items() if id(tensor) in known}
    left = sorted(set(tensors) - {known[id(tensor)] for tensor in stored.values() if id(tensor) in known})
    for group in _joined(model, {name: empty[name] for name in left}):
        for out, tensor in in_checkpoint(model, {name: empty[name] for name in group}).items():
            (dtype,) = {tensors[name].dtype for name in group}
            found[out] = Planned(dtype=dtype, shape=tuple(tensor.shape), bytes_from=_Converted(model, group, out, read))
    if found.keys() != stored.keys():
        raise ModelError(f"the checkpoint of a {type(model).__name__} has tensors that can't be told apart.")
    return found


@dataclass(frozen=True)
class _Converted:
    """Makes a tensor of a checkpoint from those of the model that it is made of."""

    model: PreTrainedModel
    names: tuple[str, ...]
    out: str
    read: Callable[[str], Tensor]

    def __call__(self) -> Tensor:
        return in_checkpoint(self.model, {name: self.read(name) for name in self.names})[self.out]


def _joined(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Names in groups whose tensors a checkpoint makes one of: those that alone give a tensor of the same name."""
    groups: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        members = {name}
        for out in in_checkpoint(model, {name: tensor}):
            members |= groups.get(out, set())
            groups[out] = members
        for out, others in groups.items():
            if others & members:
                groups[out] = members
    return sorted({tuple(sorted(members)) for members in groups.values()})
