"""From a folder that nybble wrote to files that others load.

1. open the folder; ask the target what of it can't be held, before anything is written
2. room on the disk; the target writes into DEST.partial, one tensor in memory at a time
3. if asked, those files are opened as their users open them, and compared
4. DEST appears
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nybble.checkpoint.marked import MANIFEST, check_readable, is_others
from nybble.checkpoint.save import save
from nybble.core.dtypes import FLOATS
from nybble.core.errors import UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, check_new_folder, disk_errors
from nybble.export import ExportTarget, Facts, get_target, refuse
from nybble.export._source import FolderSource
from nybble.models.adapter import adapter_for
from nybble.models.build.config_file import read_json
from nybble.models.sources.side_files import copy_side_files
from nybble.nn.kinds import targets_of
from nybble.pipelines.load import load_with_origin
from nybble.scheme import Scheme


@explicit_settings()
@torch.no_grad()
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
        folder: what ``nybble quantize`` or :func:`nybble.save` wrote, or another library's quantized model.
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
    check_readable(folder)
    name = target or _meant(folder)
    part = get_target(name)
    with _own(folder, dest) as own, FolderSource(own) as source:
        refuse(name, part.check(source))
        notes = part.notes(source)
        for note in notes:
            (announce or _ignore)(note)
        with AtomicFolder(dest) as partial:
            part.write(source, partial)
            verified = part.verify(partial, source) if check else None
        files = {str(p.relative_to(dest)): p.stat().st_size for p in sorted(dest.rglob("*")) if p.is_file()}
    found: dict[str, Any] = {
        "dest": str(dest),
        "target": name,
        "bytes": sum(files.values()),
        "source_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "files": files,
        "notes": notes,
    }
    return found if verified is None else found | {"check": asdict(verified)}


@contextmanager
def _own(folder: Path, dest: Path) -> Iterator[Path]:
    """The folder itself, or of another library's a copy in nybble's files, beside ``dest`` and for as long as needed.

    No code changes; the copy is made in memory.
    """
    if not is_others(folder):
        yield folder
        return
    with disk_errors(dest), TemporaryDirectory(prefix=f"{dest.name}.", dir=dest.absolute().parent) as room:
        config = read_json(folder / "config.json")
        stated = config.get("dtype", config.get("torch_dtype"))
        model, origin = load_with_origin(folder, dtype=stated if stated in FLOATS else None)
        copied = save(model, Path(room, "model"))
        copy_side_files(origin.side_files(), copied)
        yield copied


def constrain(scheme: Scheme, targets: list[ExportTarget], model: Any, dtype: torch.dtype) -> Scheme:
    """A scheme whose result every one of some targets holds.

    Args:
        scheme: what is asked for.
        targets: in order.
        model: float, its weights possibly on the meta device.
        dtype: of what will stay in float.

    Raises:
        SchemeError: one can't hold it; names the nearest.
    """
    convolutional = adapter_for(model).convolutional
    known = targets_of(model)
    classes = {n: t.kind.class_names(model.get_submodule(t.module), convolutional) for n, t in known.items()}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
    facts = Facts(config=config, dtype=dtype, targets=known, classes=classes)
    for target in targets:
        scheme = target.constrain(scheme, facts)
    return scheme


def _meant(folder: Path) -> str:
    """The target that a folder was quantized for."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    named = manifest.get("targets")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    raise UsageError(f"say --target: {folder} was quantized for none in particular. `nybble export --help` lists them.")


def _ignore(line: str) -> None:
    return None
