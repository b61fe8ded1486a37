"""Writing safetensors files: the same bytes every time, whole or not at all, and merging in bounded memory.

Files are written here rather than by the safetensors package because that one writes metadata in an order that
changes from run to run; reading tensors back is left to it. The layout is described in ``tensorheader``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nybble.core.errors import FileError
from nybble.core.files import WriteBehind, atomic_file, disk_errors, need_space
from nybble.core.progress import SHOWN, task
from nybble.core.tensorheader import DTYPE_BITS, TensorEntry, read_tensor_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TORCH_NAMES = {
    "complex64": "C64", "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip

_CHUNK = 1 << 20  # bytes held at once while copying
_RUN = 1 << 26  # bytes that progress may wait for


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor that is made, or copied from another file, when its turn to be written comes.

    Attributes:
        dtype: safetensors name, ``BF16``. shape: sizes.
        bytes_from: what makes it, whole or in pieces that stand one behind the other; or a file in which its bytes
            begin at ``offset``, row-major and little-endian.
        offset: into that file.
        raw: what is made may have another dtype and shape: its bytes are meant, as those of a file are.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes_from: Callable[[], Tensor | Iterator[Tensor]] | Path
    offset: int = 0
    raw: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def recast(self, shape: Sequence[int], dtype: str = "") -> Planned:
        """The same bytes under another shape, and another dtype of as many bytes (empty: the same)."""
        made, wanted = self.bytes_from, tuple(shape)
        found = replace(self, dtype=dtype or self.dtype, shape=wanted)
        if isinstance(made, Path):
            return found
        kind = _dtype_named(found.dtype)
        return replace(found, bytes_from=lambda: whole(made()).contiguous().view(kind).view(wanted))


def whole(made: Tensor | Iterator[Tensor]) -> Tensor:
    """What a plan makes, in one."""
    import torch

    return made if isinstance(made, torch.Tensor) else torch.cat(list(made))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A tensor to be written: its description, and where its bytes come from."""

    entry: TensorEntry
    bytes_from: Tensor | Path | Callable[[], Tensor | Iterator[Tensor]]
    offset: int = 0
    raw: bool = False

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Of what is made, or is in memory."""
        assert not isinstance(self.bytes_from, Path)
        yield from map(_memory, self._made(self.bytes_from))

    def _made(self, tensor: Tensor | Callable[[], Tensor | Iterator[Tensor]]) -> Iterator[Tensor]:
        """In pieces, of which no one but the writer holds one."""
        if not callable(tensor):
            yield tensor
            return
        import torch

        made, left = tensor(), self.entry.nbytes
        if isinstance(made, torch.Tensor):
            if not self.raw and tuple(made.shape) != self.entry.shape:
                raise AssertionError(f"{made.dtype} {list(made.shape)} was made where {self.entry} was planned")
            made = iter((made,))
        for piece in made:
            left -= piece.nbytes
            if left < 0 or not (self.raw or safetensors_name(piece.dtype) == self.entry.dtype):
                raise AssertionError(f"{piece.dtype} {list(piece.shape)} was made where {self.entry} was planned")
            yield piece
        if left:
            raise AssertionError(f"{left} bytes were not made of {self.entry}")


def file_chunks(path: Path, begin: int, nbytes: int) -> Iterator[memoryview]:
    """Bytes of a file, in order, some at a time, each in the place of those before.

    Raises:
        FileError: it can't be read, or has fewer.
    """
    with disk_errors(path), path.open("rb", buffering=0) as file:
        file.seek(begin)
        room = memoryview(bytearray(min(_CHUNK, nbytes)))
        while nbytes:
            count = file.readinto(room[: min(len(room), nbytes)])
            if not count:
                raise FileError(f"{path}: became shorter while it was being read.")
            nbytes -= count
            yield room[:count]


def safetensors_name(dtype: torch.dtype) -> str | None:
    """``BF16`` of torch.bfloat16; None of what safetensors can't store."""
    return _TORCH_NAMES.get(str(dtype).removeprefix("torch."))


def _dtype_named(name: str) -> torch.dtype:
    """torch.bfloat16 of ``BF16``."""
    import torch

    kind: torch.dtype = getattr(torch, next(known for known, stored in _TORCH_NAMES.items() if stored == name))
    return kind


def _memory(tensor: Tensor) -> memoryview:
    import torch

    # flatten() first: a scalar has no dimension to reinterpret as bytes.
    return tensor.detach().cpu().contiguous().resolve_conj().flatten().view(torch.uint8).numpy().data


def write_tensorfile(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to one safetensors file, whole or not at all; the same input gives the same bytes.

    Args:
        path: the file to make or replace.
        tensors: any device, strides or sharing; each is stored whole under its name.
        metadata: strings for the header.

    Raises:
        FileError: the disk is full or can't be written, or a dtype has no safetensors name.
    """
    sources = {}
    for name, tensor in tensors.items():
        dtype = safetensors_name(tensor.dtype)
        if dtype is None:
            raise FileError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, which safetensors can't store.")
        entry = TensorEntry(dtype=dtype, shape=tuple(tensor.shape), begin=0, nbytes=tensor.nbytes)
        sources[name] = _Source(entry=entry, bytes_from=tensor)
    if "__metadata__" in sources:
        raise FileError(f"{path}: a tensor can't be called '__metadata__': safetensors keeps its metadata there.")
    names = _layout(sources)
    header = _header(sources, names, metadata)
    with atomic_file(path, len(header) + _total(sources, names)) as file:
        _write(file, header, sources, names)


def stream_tensorfiles(
    tensors: Mapping[str, Planned], out: Path | str, metadata: Mapping[str, str], max_shard_bytes: int | None = None
) -> list[Path]:
    """Write tensors that are made one at a time to ``out``, or into shards beside it with an index.

    Memory holds one tensor. Shards are named, filled and moved into place as by :func:`merge_tensorfiles`.

    Args:
        tensors: by name; each is made once, those of a shard in the order of their names: what is made of one thing
            (codes and scales of a weight) is made one after the other.
        out: ``FOLDER/model.safetensors``.
        metadata: strings for every file's header.
        max_shard_bytes: most tensor bytes in one file, None for no limit.

    Returns:
        The files written, shards in order, then the index if there is one.

    Raises:
        FileError: the disk is full, or a file that tensors are copied from can't be read.
    """
    sources = {
        name: _Source(
            entry=TensorEntry(dtype=plan.dtype, shape=tuple(plan.shape), begin=0, nbytes=plan.nbytes),
            bytes_from=plan.bytes_from,
            offset=plan.offset,
            raw=plan.raw,
        )
        for name, plan in tensors.items()
    }
    return _write_shards(sources, Path(out), metadata, max_shard_bytes)


def merge_tensorfiles(
    parts: Sequence[Path], out: Path | str, metadata: Mapping[str, str], max_shard_bytes: int | None = None
) -> list[Path]:
    """Merge safetensors files into ``out``, or into shards beside it with an index, a few MB in memory at a time.

    The result depends on the tensors and ``metadata`` alone, not on how ``parts`` cut them; the parts' own metadata is
    dropped. Shards are named as Hugging Face's libraries expect (``model-00001-of-00003.safetensors`` and
    ``model.safetensors.index.json``), and none is moved into place before all are written, the index last.

    Args:
        parts: files with distinct tensor names; they stay as they are.
        out: ``FOLDER/model.safetensors``.
        metadata: strings for every file's header.
        max_shard_bytes: most tensor bytes in one file, None for no limit; a larger tensor gets a shard to itself.

    Returns:
        The files written, shards in order, then the index if there is one.

    Raises:
        FileError: a part is unreadable or malformed, two parts hold the same name, or the disk is full.
    """
    return _write_shards(_collect(parts), Path(out), metadata, max_shard_bytes)


def _write_shards(
    sources: Mapping[str, _Source], out: Path, metadata: Mapping[str, str], limit: int | None
) -> list[Path]:
    shards = _shards(sources, limit)
    stem, count = out.with_suffix(""), len(shards)
    paths = [out]
    if count > 1:
        paths = [stem.with_name(f"{stem.name}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    headers = [_header(sources, names, metadata) for names in shards]
    sizes = [len(header) + _total(sources, names) for header, names in zip(headers, shards, strict=True)]
    need_space(out, sum(sizes))
    with ExitStack() as moves:  # undone in reverse: the index, entered first, is moved last
        if count > 1:
            paths.append(out.with_name(out.name + ".index.json"))
            index = moves.enter_context(atomic_file(paths[-1]))
            index.write(_index(sources, shards, paths))
        for path, header, names, size in zip(paths, headers, shards, sizes, strict=False):
            _write(moves.enter_context(atomic_file(path, size)), header, sources, names)
    return paths


def _collect(parts: Sequence[Path]) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
    for part in parts:
        header = read_tensor_header(part)
        for name, entry in header.tensors.items():
            if name in sources:
                raise FileError(
                    f"{part}: tensor {name!r} is also in {sources[name].bytes_from}. Merge only one of them."
                )
            sources[name] = _Source(entry=entry, bytes_from=header.path, offset=header.data_start + entry.begin)
    return sources


def _shards(sources: Mapping[str, _Source], limit: int | None) -> list[list[str]]:
    """Names of each shard: filled in the order of names, then laid out."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sources):
        size = sources[name].entry.nbytes
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return [_layout({name: sources[name] for name in names}) for names in shards]


def _layout(sources: Mapping[str, _Source]) -> list[str]:
    """Names in the order of their bytes: wide elements first, so that every tensor is aligned; then by name."""
    return sorted(sources, key=lambda name: (-DTYPE_BITS[sources[name].entry.dtype], name))


def _total(sources: Mapping[str, _Source], names: Sequence[str]) -> int:
    return sum(sources[name].entry.nbytes for name in names)


def _header(sources: Mapping[str, _Source], names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in names:
        entry = sources[name].entry
        offsets = [position, position + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(to: BinaryIO, header: bytes, sources: Mapping[str, _Source], names: Sequence[str]) -> None:
    """Header, then each tensor in its place: first what is copied, then what is made, in the order of the names."""
    file = WriteBehind(to)
    file.write(header)
    places, position = {}, len(header)
    for name in names:
        places[name] = position
        position += sources[name].entry.nbytes
    with task(SHOWN.get(), len(names), "tensors") as bar:
        for run in _runs(sources, names):
            file.seek(places[run.names[0]])
            for piece in file_chunks(run.path, run.begin, run.nbytes):
                file.write(piece)
            bar.advance(len(run.names), note=run.names[-1])
        for name in sorted(name for name in names if not isinstance(sources[name].bytes_from, Path)):
            file.seek(places[name])
            for chunk in sources[name].chunks():
                file.write(chunk)
            bar.advance(note=name)
    to.flush()  # a full disk shows here, before any file is moved


@dataclass(frozen=True)
class _Run:
    """Tensors that stand side by side where they are read as well as where they are written."""

    path: Path
    begin: int
    nbytes: int
    names: tuple[str, ...]


def _runs(sources: Mapping[str, _Source], names: Sequence[str]) -> Iterator[_Run]:
    """What is copied of tensors that are written in the order of ``names``."""
    run: _Run | None = None
    for name in names:
        source = sources[name]
        beside = run is not None and (source.bytes_from, source.offset) == (run.path, run.begin + run.nbytes)
        if run is not None and beside and run.nbytes < _RUN:
            run = replace(run, nbytes=run.nbytes + source.entry.nbytes, names=(*run.names, name))
            continue
        if run is not None:
            yield run
        path = source.bytes_from
        run = _Run(path, source.offset, source.entry.nbytes, (name,)) if isinstance(path, Path) else None
    if run is not None:
        yield run


def _index(sources: Mapping[str, _Source], shards: Sequence[Sequence[str]], paths: Sequence[Path]) -> bytes:
    where = {name: path.name for names, path in zip(shards, paths, strict=False) for name in names}
    total = sum(_total(sources, names) for names in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
