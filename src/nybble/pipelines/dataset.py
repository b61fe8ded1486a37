"""``nybble generate MODEL --dataset FILE``: a set of texts that the model made, as JSON lines."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from nybble.checkpoint.parts import same_request
from nybble.core.device import out_of_memory
from nybble.core.errors import FileError, ModelError, NybbleError
from nybble.core.explicit import explicit_settings
from nybble.core.files import atomic_write_bytes, atomic_write_json, check_new_file, disk_errors, sha256_file
from nybble.core.progress import Progress, Silent, task
from nybble.data.kinds import data_kind
from nybble.models.adapter import reads_of
from nybble.nn.swap import hold_slow
from nybble.pipelines.load import load_with_origin
from nybble.training.generated import Generation, check_generates, generated
from nybble.training.tasks._fits import check_length


@explicit_settings()
def generate_dataset(
    model: str,
    out: str | Path,
    options: Generation | None = None,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let a model make texts to train or calibrate on.

    Args:
        model: what ``nybble.load`` takes; a causal language model.
        out: the file, a text a line: ``{"text": ..., "number": ...}``. It appears whole; until then it is OUT.begun
            (and OUT.begun.json, the request). Texts of white space alone are left out.
        options: how many, how long, how.
        dtype: of the model; None: bfloat16.
        device: where to run.
        resume: go on from what a killed run left, to the same bytes; without it that is made anew.
        progress: told after each batch.

    Returns:
        ``out``, ``texts``, ``tokens``, ``sha256``, and the request.

    Raises:
        NybbleError: the file exists, can't be written, or was begun with another request; the model makes no texts.
    """
    options, out = options or Generation(), Path(out)
    check_new_file(out)
    request = {"model": model, "dtype": dtype, "device": device, **json.loads(json.dumps(asdict(options)))}
    partial, note = out.with_name(f"{out.name}.begun"), out.with_name(f"{out.name}.begun.json")
    begun = resume and note.exists() and (partial.exists() or out.exists())
    if begun:
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(f"{note} can't be read ({error}); remove it and {partial}, and begin anew.") from error
        same_request(partial, before, request)
    elif out.exists():
        raise FileError(f"{out} exists already. Remove it or choose another file.")
    if not out.exists():
        _make(model, out, options, request, begun, progress or Silent())
    for path in (partial, note):
        path.unlink(missing_ok=True)
    found = [json.loads(line)["tokens"] for line in out.read_bytes().splitlines()]
    return {"out": str(out), "texts": len(found), "tokens": sum(found), "sha256": sha256_file(out), **request}


def _make(model: str, out: Path, options: Generation, request: dict[str, Any], begun: bool, progress: Progress) -> None:
    partial, note = out.with_name(f"{out.name}.begun"), out.with_name(f"{out.name}.begun.json")
    device = request["device"]
    loaded, origin = load_with_origin(model, dtype=request["dtype"], device=device)
    if not hasattr(loaded, "can_generate") or reads_of(loaded) != "tokens":
        raise ModelError(f"{model} is a {type(loaded).__name__}, which generates no text.")
    check_generates(loaded)
    check_length(loaded, model, options.length, "length")
    tokenizer = data_kind("tokens").tokenizer(origin)
    with disk_errors(out), out_of_memory(device):
        if not begun:
            atomic_write_json(note, request)
            partial.write_bytes(b"")
        try:
            _write(loaded, tokenizer, options, partial, progress)
            lines = [
                line for line in partial.read_bytes().splitlines(keepends=True) if json.loads(line)["text"].strip()
            ]
            if not lines:
                raise ModelError(f"{model} made nothing but white space in {options.count} texts.")
        except BaseException as error:
            if isinstance(error, NybbleError) or not partial.stat().st_size:  # nothing to go on from
                partial.unlink()
                note.unlink()
            raise
        atomic_write_bytes(out, b"".join(lines))


def _write(model: nn.Module, tokenizer: Any, options: Generation, partial: Path, progress: Progress) -> None:
    """Append what is missing, a batch at a time; a batch that a kill cut is made again."""
    hold_slow(model, model.dtype)  # type: ignore[arg-type]
    start = _whole(partial, options.batch)
    with partial.open("ab") as file, task(progress, options.count, "texts") as bar:
        bar.advance(start)
        for batch in generated(model, tokenizer, options, start):
            lines = []
            for number, ids in batch:
                text = tokenizer.decode(ids, skip_special_tokens=True)
                line = {"text": text, "number": number, "tokens": len(ids)}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            bar.advance(len(batch))


def _whole(partial: Path, batch: int) -> int:
    """How many texts are there in whole batches; what is behind them is cut off."""
    kept = partial.read_bytes().splitlines(keepends=True)
    if kept and not kept[-1].endswith(b"\n"):
        kept.pop()
    count = len(kept) - len(kept) % batch
    with partial.open("r+b") as file:
        file.truncate(sum(map(len, kept[:count])))
    return count
