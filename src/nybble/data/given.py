"""What a caller hands over in Python instead of a SRC: texts, tensors, or samples that are ready."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.rows import row_record
from nybble.data.samples import Origin, Samples, Wanted, patches
from nybble.data.text import make_source

if TYPE_CHECKING:
    from nybble.data.kinds import DataKind

Array: TypeAlias = np.ndarray[Any, Any]

Data: TypeAlias = (
    str
    | Path
    | Samples
    | Tensor
    | Array
    | Mapping[str, Tensor]
    | Mapping[str, Array]
    | Sequence[str]
    | Sequence[Tensor]
    | Sequence[Array]
    | Sequence[Mapping[str, Any]]
)
"""A SRC; samples; texts; a model's main input with samples in front; its inputs by name; a list of either of these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenSamples:
    """Tensors of the caller's own, as the model is called with them.

    Attributes:
        inputs: by argument, the main one first; the first dimension counts samples.
        tokens: of the main input; an image counts one for 16 x 16 pixels. Padding is left out.
        sha256: of the inputs' names and bytes.
    """

    inputs: dict[str, Tensor]
    tokens: int
    sha256: str
    source: str = "given in Python"

    @property
    def available(self) -> int:
        """All."""
        return next(iter(self.inputs.values())).shape[0]

    def manifest(self) -> dict[str, Any]:
        """What can be said of them."""
        return {
            "source": self.source,
            "inputs_sha256": self.sha256,
            "samples": self.available,
            "inputs": {name: list(tensor.shape) for name, tensor in self.inputs.items()},
        }


def samples_of(data: Data, kind: DataKind, origin: Origin, wanted: Wanted, main: str) -> Samples:
    """Samples of whatever the caller gave.

    Args:
        data: a SRC or texts, which the model's kind of data prepares; tensors or samples, which are taken as they are.
        kind: what the model reads.
        origin: the model's place: its tokenizer.
        wanted: how many samples of a SRC or of texts, and how long.
        main: the model's main input: what a tensor without a name is.

    Raises:
        UsageError: none of these. DataError: nothing in it, or tensors that don't fit together.
    """
    data = _with_tensors(data)
    if isinstance(data, str | Path):
        return kind.prepare(str(data), origin, wanted)
    if isinstance(data, Tensor):
        return _samples([{main: data}], main)
    if isinstance(data, Mapping):
        return _ready(data, main) if kind.of_model else _samples([data], main)
    if isinstance(data, list | tuple):
        if not data:
            raise DataError("the data is an empty list; give texts, tensors or samples, or leave it out for 'builtin'.")
        if all(isinstance(item, str) for item in data):
            return kind.of_texts(
                make_source(data, name="given in Python", note="texts of the caller's"), origin, wanted
            )
        if all(isinstance(item, Tensor) for item in data):
            return _samples([{main: item} for item in data], main)
        if all(isinstance(item, Mapping) for item in data):
            if all(
                isinstance(item.get("messages"), list) or any(isinstance(v, str) for v in item.values())
                for item in data
            ):
                chats = any("messages" in item for item in data)
                chat = kind.tokenizer(origin) if chats else None
                rows = (row_record(item, f"data[{number}]", chat) for number, item in enumerate(data))
                return kind.of_texts(
                    make_source(rows, name="given in Python", note="texts of the caller's"), origin, wanted
                )
            return _samples(data, main)
    if isinstance(getattr(data, "inputs", None), Mapping):
        return data  # type: ignore[return-value]  # an object of the caller's own, with what Samples has
    came = f"a {type(data).__name__}"
    if isinstance(data, list | tuple):
        came += " of " + ", ".join(sorted({type(item).__name__ for item in data}))
    raise UsageError(
        f"data is {came}; it can be a SRC ('builtin', a file), a list of texts, a tensor of {main} [samples, ...], a "
        f"mapping of a model's inputs, a list of either, or samples of nybble.data."
    )


def _with_tensors(data: Any) -> Any:
    """Arrays of numpy as tensors, alone and in lists and mappings."""
    if isinstance(data, np.ndarray):
        return torch.from_numpy(data.copy())
    if isinstance(data, list | tuple):
        return [_with_tensors(item) for item in data]
    if isinstance(data, Mapping):
        return {name: _with_tensors(value) if isinstance(value, np.ndarray) else value for name, value in data.items()}
    return data


def _samples(items: Sequence[Mapping[str, Any]], main: str) -> GivenSamples:
    names = list(items[0])
    for item in items:
        if not item:
            raise DataError("the data holds a mapping without inputs; it names a model's inputs: input_ids, say.")
        if set(item) != set(names):
            raise DataError(f"samples have different inputs: {', '.join(names)}, and {', '.join(item)}.")
    first = main if main in names else names[0]
    rows = {name: [_row(item[name], name) for item in items] for name in sorted(names, key=lambda name: name != first)}
    inputs = {name: _stacked(name, tensors) for name, tensors in rows.items()}
    if first not in ("input_ids", "decoder_input_ids"):
        return _made(inputs, _size(inputs[first]))
    lengths = {tensor.shape[1] for tensor in rows[first]}
    if len(lengths) > 1 and "attention_mask" not in inputs:
        inputs["attention_mask"] = _stacked("attention_mask", [torch.ones_like(ids) for ids in rows[first]])
    mask = inputs.get("attention_mask")
    return _made(inputs, inputs[first].numel() if mask is None else int(mask.sum()))


def _ready(data: Mapping[str, Any], main: str) -> GivenSamples:
    """Tensors as the model is called with them, a number a sample among them (a timestep, a class)."""
    names = sorted(data, key=lambda name: name != main)
    bare = [name for name in names if not isinstance(data[name], Tensor) or not data[name].numel()]
    if bare or main not in data:
        what = f"{bare[0]} is no tensor with something in it" if bare else f"it has no {main}"
        raise DataError(f"the data maps {', '.join(names) or 'nothing'}, and {what}.")
    return _made({name: data[name].detach().cpu() for name in names}, _size(data[main]))


def _made(inputs: dict[str, Tensor], tokens: int) -> GivenSamples:
    digest = hashlib.sha256()
    for name, tensor in inputs.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return GivenSamples(inputs=inputs, tokens=tokens, sha256=digest.hexdigest())


def _row(value: Any, name: str) -> Tensor:
    """A tensor with samples in front, on the CPU: one sequence of token ids may come without, and as a list."""
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"data[{name!r}] is a {type(value).__name__} that is no tensor: {error}.") from error
    if name == "input_ids" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise DataError(f"input_ids are {tensor.dtype}; token ids are integers.")
    if tensor.dim() == 1 and not tensor.is_floating_point():
        tensor = tensor[None]
    if tensor.dim() < 2 or not tensor.numel():
        raise DataError(f"{name} has the shape {list(tensor.shape)}; it needs samples in front, and something in each.")
    return tensor


def _stacked(name: str, rows: list[Tensor]) -> Tensor:
    """One tensor of all; sequences of integers are padded with zeros on the right (the attention mask says where)."""
    if len({tuple(row.shape[1:]) for row in rows}) > 1:
        if any(row.dim() != 2 or row.is_floating_point() for row in rows):
            shapes = sorted({str(list(row.shape[1:])) for row in rows})
            raise DataError(f"{name} of different shapes: {', '.join(shapes)}. Give all the same.")
        longest = max(row.shape[1] for row in rows)
        rows = [torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows]
    return torch.cat(rows)


def _size(main: Tensor) -> int:
    """About how many vectors a layer sees."""
    return patches(main) if main.dim() == 4 else main.shape[0] * max(1, main[0].numel() // main.shape[-1])
