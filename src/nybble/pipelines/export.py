"""From a folder that nybble wrote to files that others load.

1. open the folder; ask the target what of it can't be held, before anything is written
2. room on the disk; the target writes into DEST.partial, one tensor in memory at a time
3. if asked, those files are opened as their users open them, and compared
4. DEST appears
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nybble.checkpoint.marked import MANIFEST, is_quantized
from nybble.core.errors import FileError, ModelError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, check_new_folder, disk_errors
from nybble.core.memory import new_objects_alone
from nybble.core.progress import Progress, Silent, showing
from nybble.export import ExportTarget, check_source, get_target, refusals, refuse
from nybble.export._opened import OpenedSource
from nybble.export._source import FolderSource, Source
from nybble.models.build.config_file import read_json
from nybble.models.sources.open import open_source


@explicit_settings()
@torch.no_grad()
@new_objects_alone()
def export(
    folder: str | Path,
    dest: str | Path,
    target: str = "",
    *,
    check: bool = False,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a quantized model as another program loads it.

    Args:
        folder: what ``nybble quantize`` or :func:`nybble.save` wrote, or another library's quantized model; one in
            float for a target that is not about quantization (``c-train``).
        dest: must not exist; it appears whole or not at all.
        target: a target's name, with its option behind a colon; empty takes the one that the folder was quantized for.
        check: open the result with the libraries that load it, and compare weights and logits with nybble's.
        announce: gets what will be lost, a line each, before anything is written.

    Returns:
        ``dest``, ``target``, ``bytes``, ``source_bytes``, ``files``, ``notes``; with ``check`` also ``check``: the
        fields of :class:`nybble.export.Verified`.

    Raises:
        UsageError: no such target, or a library that it needs is missing or too old. ModelError: the target can't hold
            a layer; every one is named, with the nearest that it holds. FileError: files that are damaged, in the way,
            or can't be written; or with ``check``, that don't open or differ.
    """
    folder, dest = Path(folder), Path(dest)
    check_new_folder(dest)
    check_source(folder, target)
    name = target or _meant(folder)
    part = get_target(name)
    with opened(folder, dest) as source:
        if isinstance(source, OpenedSource) and not source.layers and not part.in_float:
            raise ModelError(f"{folder} has its weights in float; export what `nybble quantize` makes of it.")
        refuse(name, refusals(part, source))
        part.require(check)
        return written(source, dest, part, name, check=check, announce=announce)


def export_at_once(
    folder: Path, targets: Sequence[str], announce: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """The files of those targets that ``nybble quantize`` writes itself, in ``folder/NAME``; of the others a line.

    Args:
        folder: what was quantized for them.
        targets: their names, with options.
        announce: gets what will be lost, and how the other targets' files are made.

    Returns:
        for each that was written what :func:`export` says of it.

    Raises:
        FileError: as :func:`export`; ``folder`` is whole, and the message says how to go on from it.
    """
    found = []
    for name in targets:
        dest = folder / name.partition(":")[0].lower()
        if not get_target(name).at_once:
            (announce or _ignore)(f"nybble export {folder} DEST --target {name} writes the files that {name} means")
            continue
        try:
            found.append(export(folder, dest, name, announce=announce))
        except FileError as error:
            again = f"nybble export {folder} {dest} --target {name}"
            raise FileError(f"{error} {folder} itself is complete; `{again}` makes this of it.") from error
    return found


def written(
    source: Source,
    dest: Path,
    part: ExportTarget,
    name: str,
    *,
    check: bool,
    announce: Callable[[str], None] | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what a target holds; see :func:`export`, whose answer this is.

    Args:
        source: that the target's ``check`` found nothing against.
        dest: must not exist.
        part: the target.
        name: as it was asked for, with its option.
        check: as there.
        announce: as there.
        progress: gets tensors.
    """
    notes = [*source.notes, *part.notes(source)]
    for note in notes:
        (announce or _ignore)(note)
    with AtomicFolder(dest) as partial, showing(progress or Silent()):
        part.write(source, partial)
        verified = part.verify(partial, source) if check else None
    files = {str(p.relative_to(dest)): p.stat().st_size for p in sorted(dest.rglob("*")) if p.is_file()}
    found: dict[str, Any] = {
        "dest": str(dest),
        "target": name,
        "bytes": sum(files.values()),
        "source_bytes": source_bytes(source.place),
        "files": files,
        "notes": notes,
    }
    return found if verified is None else found | {"check": asdict(verified)}


def source_bytes(place: str) -> int:
    """Bytes of a model's file, or of the files in its folder; 0 of what is neither.

    In folders below it stands what it was exported to (:func:`export_at_once`), DEST among them.
    """
    path = Path(place)
    return sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]) if p.is_file())


@contextmanager
def opened(model: str | Path, dest: Path) -> Iterator[Source]:
    """What :func:`export` and :func:`~nybble.pipelines.convert.convert` take, as targets see it; nothing is read yet.

    Args:
        model: a folder that nybble wrote, or whatever :func:`nybble.models.sources.open.open_source` takes.
        dest: beside which there is room for what has to be written first.
    """
    folder = Path(model)
    if folder.is_dir() and is_quantized(folder):
        with FolderSource(folder) as own:
            own.check()
            yield own
        return
    found = open_source(str(model))
    above = next(place for place in dest.absolute().parents if place.is_dir())
    with disk_errors(dest), TemporaryDirectory(prefix=f"{dest.name}.", dir=above) as room, found.held_open():
        yield OpenedSource(found, Path(room))


def _meant(folder: Path) -> str:
    """The target that a folder was quantized for."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    named = manifest.get("targets")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    raise UsageError(f"say --target: {folder} was quantized for none in particular. `nybble export --help` lists them.")


def _ignore(line: str) -> None:
    return None
