"""A model as one GGUF file: plan, then one tensor at a time; the file appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError, UsageError
from nybble.core.files import WriteBehind, disk_errors, need_space, sync_folder
from nybble.core.finite import all_finite
from nybble.core.progress import SHOWN, task
from nybble.core.tensorfile import file_chunks
from nybble.core.versions import VERSION
from nybble.models.gguf.metadata import arch_for, config_pairs, gguf_name
from nybble.models.gguf.mixes import FLOATS, Mix, file_type_name, fitting, mix, type_for
from nybble.models.gguf.qtensors import exact_type, fitted, global_scale, line_of
from nybble.models.gguf.rope import rope_tensors
from nybble.models.gguf.types import block_type, encode, encoded, type_name
from nybble.models.gguf.vocabulary import tokenizer_pairs
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from nybble.models.sources.gguf_names import GgufArch

ROWS = 1 << 22
"""Elements of a float tensor that are quantized at a time."""
_FEW = 1 << 16
"""Elements whose squares are summed in float32, and which stay in the cache meanwhile."""
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter of the model.

    Attributes:
        shape: as transformers has it. dtype: of a float one.
        read: gives it, once: a tensor, or a QTensor of this shape.
        stored: a QTensor's description, its tensors on the meta device; None of a float one.
        blocks: of a type (``Q4_K``), and whether its rows are in llama.cpp's order: file, offset and size of the bytes
            that :attr:`read` would be written as; None where there are none.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor | QTensor]
    dtype: torch.dtype = torch.float32
    stored: QTensor | None = None
    blocks: Callable[[str, bool], tuple[Path, int, int] | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor of the file.

    Attributes:
        name: GGUF's. source: the parameter's. kind: ``F32``, ``Q4_K``. exact: the codes are written as they are.
        kept: so are they, or a float matrix in its dtype; norms and biases, which every file has in F32, always.
    """

    name: str
    source: str
    kind: str
    exact: bool = False
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written.

    Attributes:
        nbytes: of the file. types: GGUF tensor -> type. notes: what is not as it was asked for, a line each.
        errors: parameter -> ``|W - W'|^2 / |W|^2``, of all that were rounded or cast while they were written.
    """

    nbytes: int
    types: Mapping[str, str]
    notes: Sequence[str]
    errors: Mapping[str, float]


def plan(
    config: PreTrainedConfig, weights: Mapping[str, Weight], file_type: str = ""
) -> tuple[list[Planned], list[str]]:
    """Which tensor gets which type; nothing is read.

    Args:
        config: of the model.
        weights: parameter -> weight; of tied ones, one.
        file_type: of what is in float: a type, or a mixture of llama.cpp's (``q4_k_m``). Quantized weights that a type
            holds exactly keep their codes whatever it is; others are rounded again. Empty: all stays as it is.

    Returns:
        tensors in the file's order, and what is worth saying.

    Raises:
        ModelError: an architecture that isn't known, a tensor without a place. UsageError: no such file type; a weight
            that no type holds, without ``file_type``.
    """
    name, arch = arch_for(config)
    asked = mix(file_type) if file_type else None
    stored = {id(weight.stored): weight.stored for weight in weights.values() if weight.stored is not None}
    exact = {key: exact_type(weight) for key, weight in stored.items()}  # layers of one layout share a description
    found: list[Planned] = []
    shorter: dict[tuple[str, str], list[str]] = {}
    again: dict[tuple[str, str], list[str]] = {}
    for source, weight in weights.items():
        target = gguf_name(source, arch)
        if target is None:
            raise ModelError(f"{source} has no place in a GGUF of architecture {name}; use another target.")
        kind = exact.get(id(weight.stored))
        if kind is not None:
            found.append(Planned(name=target, source=source, kind=type_name(kind), exact=True, kept=True))
            continue
        if weight.stored is not None and asked is None:
            raise UsageError(
                f"{source}: no GGUF type holds {line_of(weight.stored)} in rows of {weight.shape[-1]} exactly. "
                "Quantize with a type's own line (--weights q4_k, q8_0, mxfp4 ...), or name a file type to round to "
                "(gguf:q4_k_m)."
            )
        wanted, got = _type(target, weight, asked, config)
        if weight.stored is not None:
            again.setdefault((line_of(weight.stored), got), []).append(target)
        if wanted != got:
            shorter.setdefault((wanted, got), []).append(target)
        kept = len(weight.shape) != 2 or (weight.stored is None and got == _DTYPES.get(weight.dtype))
        found.append(Planned(name=target, source=source, kind=got, kept=kept))
    notes = [f"rows that {a}'s blocks don't divide are {b}: {_listed(names)}" for (a, b), names in shorter.items()]
    notes += [f"rounded again, {line} to {kind}: {_listed(names)}" for (line, kind), names in again.items()]
    return _ordered(found), notes


def _type(name: str, weight: Weight, asked: Mix | None, config: PreTrainedConfig) -> tuple[str, str]:
    """The type that is wanted, and the one that fits the rows."""
    if len(weight.shape) != 2:
        return "F32", "F32"
    if asked is None:
        kind = _DTYPES.get(weight.dtype, "F32")
        return kind, kind
    wanted = type_for(asked, name, config.num_hidden_layers, bool(config.tie_word_embeddings))
    return wanted, fitting(wanted, weight.shape[-1])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ordered(found: Sequence[Planned]) -> list[Planned]:
    """As llama.cpp's converter has them: the embedding, the blocks in order, the rest."""

    def place(tensor: Planned) -> tuple[int, int, str]:
        prefix, _, rest = tensor.name.partition(".")
        number = rest.partition(".")[0]
        block = int(number) if prefix == "blk" and number.isdecimal() else -1
        return (0 if prefix == "token_embd" else 1 if block >= 0 else 2, block, tensor.name)

    return sorted(found, key=place)


def write_gguf(
    path: Path,
    config: PreTrainedConfig,
    weights: Mapping[str, Weight],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    file_type: str = "",
    energies: Mapping[str, Tensor] | None = None,
    name: str = "",
    was: int | None = None,
) -> Written:
    """Write a model; one tensor is in memory at a time.

    Args:
        path: of the file; its folder must exist.
        config: of the float model.
        weights: parameter -> weight.
        tokenizer: goes into the metadata; None leaves it out.
        file_type: see :func:`plan`.
        energies: parameter -> mean square of each of its inputs, float32 [columns]: what counts when float weights are
            rounded here (llama.cpp's imatrix).
        name: of the model, for people.
        was: ``general.file_type`` of the GGUF file that the weights come from, and so of this one where all are kept.

    Raises:
        ModelError, UsageError: see :func:`plan`; a tokenizer that llama.cpp has no rules for; nothing is written.
        FileError: the disk.
    """
    tensors, notes = plan(config, weights, file_type)
    arch_name, arch = arch_for(config)
    pairs = config_pairs(config, arch_name, arch)
    if tokenizer is not None:
        pairs |= tokenizer_pairs(tokenizer, config.vocab_size)
    pairs["general.type"] = "model"
    pairs["general.file_type"] = _number(tensors, file_type, was)
    pairs["general.quantization_version"] = 2
    pairs["general.quantized_by"] = f"nybble {VERSION}"
    if name:
        pairs["general.name"] = name
    partial = path.with_name(path.name + ".partial")
    context = _Context(config, arch, energies or {}, {})
    need_space(path, sum(_nbytes(t.kind, weights[t.source].shape) for t in tensors))
    with disk_errors(path):
        try:
            _write(partial, arch_name, pairs, tensors, weights, context)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            size = partial.stat().st_size
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return Written(nbytes=size, types={t.name: t.kind for t in tensors}, notes=notes, errors=context.errors)


@dataclass(frozen=True)
class _Context:
    config: PreTrainedConfig
    arch: GgufArch
    energies: Mapping[str, Tensor]
    errors: dict[str, float]


def _write(
    partial: Path,
    arch: str,
    pairs: Mapping[str, Any],
    tensors: Sequence[Planned],
    weights: Mapping[str, Weight],
    context: _Context,
) -> None:
    from gguf import GGUFWriter

    writer: Any = GGUFWriter(None, arch)
    for key, value in pairs.items():
        add_pair(writer, key, value)
    extra = rope_tensors(context.config)
    for key, values in extra.items():
        writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
    scaled = [t for t in tensors if t.kind not in FLOATS and block_type(t.kind).scaled_apart]
    for tensor in tensors:
        shape = weights[tensor.source].shape
        writer.add_tensor_info(tensor.name, shape, np.dtype("f4"), _nbytes(tensor.kind, shape), ggml_type(tensor.kind))
    for tensor in scaled:
        writer.add_tensor_info(_scale_name(tensor), (1,), np.dtype("f4"), 4)
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        behind = WriteBehind(file)
        for values in extra.values():
            _append(writer, behind, file, [values], values.nbytes)
        globals_: dict[str, Tensor] = {}
        with task(SHOWN.get(), len(tensors), "tensors") as bar:
            for tensor in tensors:
                weight = weights[tensor.source]
                pieces = _data(tensor, weight, context, globals_)
                _append(writer, behind, file, pieces, _nbytes(tensor.kind, weight.shape))
                bar.advance(note=tensor.name)
        for tensor in scaled:
            _append(writer, behind, file, [globals_[tensor.name].numpy()], 4)
    finally:
        for file in writer.fout or []:
            file.close()


def _append(writer: Any, behind: WriteBehind, file: BinaryIO, pieces: Iterable[Any], nbytes: int) -> None:
    """Write arrays that are a tensor of ``nbytes``; the writer would ask for all of it in one."""
    begin = file.tell()
    behind.seek(begin)  # the writer has put something between
    for piece in pieces:
        behind.write(piece.data)
    if file.tell() - begin != nbytes:
        raise AssertionError(f"{file.tell() - begin} bytes were made where {nbytes} were planned")
    writer.write_padding(file, file.tell())


def add_pair(writer: Any, key: str, value: Any) -> None:
    """A value under the type that llama.cpp reads: u32 for integers, f32, bool, string, lists of these."""
    from gguf import GGUFValueType as Kind

    kinds = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    if isinstance(value, list):
        inner = kinds[type(value[0])] if value else Kind.STRING
        writer.add_key_value(key, value, Kind.ARRAY, sub_type=Kind.INT32 if inner == Kind.UINT32 else inner)
        return
    writer.add_key_value(key, value, kinds[type(value)])


def _scale_name(tensor: Planned) -> str:
    return tensor.name.removesuffix(".weight") + ".scale"


def ggml_type(kind: str) -> Any:
    """A type as the package gguf has it.

    Raises:
        UsageError: an older one, which doesn't know it.
    """
    from gguf.constants import GGMLQuantizationType

    number = FLOATS[kind] if kind in FLOATS else block_type(kind).number
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        raise UsageError(f"the installed package gguf doesn't know {kind}; pip install -U gguf") from None


def _nbytes(kind: str, shape: tuple[int, ...]) -> int:
    count = int(np.prod(shape))
    if kind in FLOATS:
        return count * (4 if kind == "F32" else 2)
    found = block_type(kind)
    return count // found.block * found.nbytes


def file_type_of(tensors: Sequence[Planned], file_type: str = "", was: int | None = None) -> str:
    """What a file is called: ``Q4_K_M``; where nothing was asked for, the type that most of its matrices have.

    Args:
        tensors: that it will have.
        file_type: see :func:`plan`.
        was: see :func:`write_gguf`; of matrices that most have another type in, a mixture's name says which.
    """
    if _all_kept(was, tensors):
        return file_type_name(was)
    if file_type:
        return file_type.upper().replace("-", "_")
    kinds = [t.kind for t in tensors if t.kind != "F32"] or ["F32"]
    return max(dict.fromkeys(kinds), key=kinds.count)


def _all_kept(was: int | None, tensors: Sequence[Planned]) -> TypeGuard[int]:
    return bool(file_type_name(was)) and all(tensor.kept for tensor in tensors)


def _number(tensors: Sequence[Planned], file_type: str, was: int | None) -> int:
    """``general.file_type``."""
    return was if _all_kept(was, tensors) else mix(file_type_of(tensors, file_type)).number


def _data(tensor: Planned, weight: Weight, context: _Context, scales: dict[str, Tensor]) -> Iterator[Any]:
    """A tensor's bytes, in arrays of any dtype and shape."""
    kept = weight.blocks(tensor.kind, _turns(tensor.source, context.arch)) if weight.blocks and tensor.exact else None
    if kept is not None:
        yield from (np.frombuffer(chunk, np.uint8) for chunk in file_chunks(*kept))
        return
    value = weight.read()
    if tuple(value.shape) != weight.shape:
        raise FileError(f"{tensor.source} is {list(value.shape)}; {list(weight.shape)} was expected.")
    kind = None if tensor.kind in FLOATS else block_type(tensor.kind)
    if kind is not None and (tensor.exact or kind.scaled_apart):
        whole = fitted(kind, value if isinstance(value, QTensor) else kind.quantizer.quantize(value))
        if isinstance(value, Tensor):
            context.errors[tensor.source] = _Error().add(value, whole.dequantize()).relative
        found = global_scale(whole)
        scales[tensor.name] = torch.ones(1) if found is None else found.cpu()
        if not _turns(tensor.source, context.arch):
            yield from encoded(kind, whole)
            return
        data = encode(kind, whole)
    else:
        plain = value.dequantize() if isinstance(value, QTensor) else value.detach()
        if tensor.name.endswith("norm.weight"):
            plain = plain.float() + context.arch.norm_offset
        error = _Error()
        data = _rounded(tensor, plain, context.energies.get(tensor.source), error)
        context.errors[tensor.source] = error.relative
    yield permuted(tensor.source, data, context.config, context.arch).contiguous().numpy()


def _turns(source: str, arch: GgufArch) -> bool:
    """Whether llama.cpp has the rows of a parameter in another order."""
    return arch.rope_interleaved and (".q_proj." in source or ".k_proj." in source)


def permuted(source: str, data: Tensor, config: PreTrainedConfig, arch: GgufArch) -> Tensor:
    """Rows of q and k as llama.cpp rotates them: of each head's halves, one of each in turn.

    Args:
        source: the parameter.
        data: its rows, values or bytes.
        config: of the model.
        arch: what it is in llama.cpp.
    """
    if not _turns(source, arch):
        return data
    heads = config.num_attention_heads if ".q_proj." in source else config.num_key_value_heads
    halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return halves.transpose(1, 2).reshape(data.shape)


class _Error:
    """``|W - W'|^2 / |W|^2`` of a tensor in pieces."""

    def __init__(self) -> None:
        self._lost = self._whole = 0.0

    def add(self, before: Tensor, after: Tensor) -> _Error:
        """A piece, as it was and as it is."""
        for few, same in zip(*(torch.split(side.reshape(-1), _FEW) for side in (before, after)), strict=True):
            wide = few.float()
            off = wide - same.float()
            self._lost += float(off.dot(off))
            self._whole += float(wide.dot(wide))
        return self

    @property
    def relative(self) -> float:
        return self._lost / self._whole if self._whole else self._lost


def _rounded(tensor: Planned, plain: Tensor, energy: Tensor | None, error: _Error) -> Tensor:
    """A float tensor in the file's type."""
    if not all_finite(plain):
        raise ModelError(f"{tensor.source} holds NaN or Inf; repair the model.")
    if tensor.kind not in FLOATS:
        return torch.cat(list(_blocks(tensor.kind, plain, energy, error)))
    cast = plain.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.kind])
    if cast.dtype not in (plain.dtype, torch.float32) or plain.dtype == torch.float64:  # else every number is one there
        error.add(plain, cast)
    return cast.view(torch.uint8).view(*plain.shape[:-1], -1) if tensor.kind == "BF16" else cast


def _chunks(plain: Tensor) -> Sequence[Tensor]:
    return torch.split(plain, max(1, ROWS // plain.shape[-1])) if plain.ndim else (plain,)


def _blocks(kind: str, plain: Tensor, energy: Tensor | None, error: _Error) -> Iterator[Tensor]:
    found = block_type(kind)
    quantizer = found.quantizer
    for rows in _chunks(plain):
        wide = rows.float()
        params = quantizer.fit(wide, None if energy is None else energy.float()[None])
        made = quantizer.quantize(wide, params)
        error.add(wide, made.dequantize())
        yield encode(found, made)
