"""``nybble generate MODEL --dataset FILE``: a set of texts that the model made, as JSON lines."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from nybble.checkpoint.parts import same_request
from nybble.core import ranks
from nybble.core.device import out_of_memory
from nybble.core.errors import FileError, ModelError
from nybble.core.explicit import explicit_settings
from nybble.core.files import (
    atomic_write_bytes,
    atomic_write_json,
    check_new_file,
    disk_errors,
    only_writer,
    sha256_file,
)
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
        options: how many, how long, how. Several processes (:mod:`nybble.core.ranks`) share the batches.
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
    request = {"model": model, "dtype": dtype, "device": device, **json.loads(json.dumps(asdict(options)))}
    with ranks.together(), ExitStack() as stack:
        ranks.agreed({"out": str(out), **request})
        ranks.lead_alone(lambda: _claim(stack, out))
        begun = ranks.lead_alone(lambda: _begun(out, request, resume))
        if ranks.lead_alone(lambda: not out.exists()):
            _make(model, out, options, request, begun, (progress if ranks.leads() else None) or Silent())
        return ranks.lead_alone(lambda: {"out": str(out), **_counted(out), **request})


def _beside(out: Path) -> tuple[Path, Path]:
    """What there is of a file that isn't whole: texts, and the request."""
    return out.with_name(f"{out.name}.begun"), out.with_name(f"{out.name}.begun.json")


def left_over(out: Path) -> bool:
    """Whether a run was killed before the file was there, or before it had cleared up."""
    return not out.exists() or _beside(out)[1].exists()


def _claim(stack: ExitStack, out: Path) -> None:
    """Keep the file from other runs, as long as this process is in ``stack``."""
    check_new_file(out)
    stack.enter_context(only_writer(out, _beside(out)[0]))


def _begun(out: Path, request: dict[str, Any], resume: bool) -> bool:
    """Whether there is something to go on with; of the same request."""
    partial, note = _beside(out)
    if not (resume and note.exists()):
        if out.exists():
            raise FileError(f"{out} exists already. Remove it or choose another file.")
        return False
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{note} can't be read ({error}); remove it and {partial}, and begin anew.") from error
    same_request(partial, before, request)
    return True


def _counted(out: Path) -> dict[str, Any]:
    """Clears up beside the whole file; how much is in it."""
    for path in _beside(out):
        path.unlink(missing_ok=True)
    found = [json.loads(line)["tokens"] for line in out.read_bytes().splitlines()]
    return {"texts": len(found), "tokens": sum(found), "sha256": sha256_file(out)}


def _make(model: str, out: Path, options: Generation, request: dict[str, Any], begun: bool, progress: Progress) -> None:
    device = request["device"]
    loaded, origin = load_with_origin(model, dtype=request["dtype"], device=device)
    if not hasattr(loaded, "can_generate") or reads_of(loaded) != "tokens":
        raise ModelError(f"{model} is a {type(loaded).__name__}, which generates no text.")
    check_generates(loaded)
    check_length(loaded, model, options.length, "length")
    tokenizer = data_kind("tokens").tokenizer(origin)
    hold_slow(loaded, loaded.dtype)
    with disk_errors(out), out_of_memory(device):
        start = ranks.lead_alone(lambda: _start(out, options, request, begun))
        try:
            _write(loaded, tokenizer, options, start, out, progress)
            ranks.lead_alone(lambda: _publish(model, out, options))
        except BaseException as error:
            if ranks.leads():
                _forget(out, error)
            raise


def _start(out: Path, options: Generation, request: dict[str, Any], begun: bool) -> int:
    """How many texts are there."""
    partial, note = _beside(out)
    if not begun:
        atomic_write_json(note, request)
        partial.write_bytes(b"")
    return _whole(partial, options.batch)


def _publish(model: str, out: Path, options: Generation) -> None:
    lines = _beside(out)[0].read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["text"].strip()]
    if not kept:
        raise ModelError(f"{model} made nothing but white space in {options.count} texts.")
    atomic_write_bytes(out, b"".join(kept))


def _forget(out: Path, error: BaseException) -> None:
    """Remove what is nothing to go on from: of a model that makes no texts, or none yet."""
    partial, note = _beside(out)
    if isinstance(error, ModelError) or not partial.stat().st_size:
        note.unlink()
        partial.unlink()


def _write(model: nn.Module, tokenizer: Any, options: Generation, start: int, out: Path, progress: Progress) -> None:
    """Append what is missing, a batch of each rank at a time; one that a kill cut is made again."""
    size, batch = ranks.size(), options.batch
    own = generated(model, tokenizer, options, start + ranks.number() * batch, every=size)
    with _beside(out)[0].open("ab") as file, task(progress, options.count, "texts") as bar:
        bar.advance(start)
        for _ in range(start, options.count, size * batch):
            made = [line for lines in ranks.gather(_lines(tokenizer, next(own, []))) for line in lines]
            if ranks.leads():
                file.write("".join(made).encode())
                file.flush()
                os.fsync(file.fileno())
            bar.advance(len(made))


def _lines(tokenizer: Any, batch: list[tuple[int, list[int]]]) -> list[str]:
    found = []
    for number, ids in batch:
        line = {"text": tokenizer.decode(ids, skip_special_tokens=True), "number": number, "tokens": len(ids)}
        found.append(json.dumps(line, ensure_ascii=False) + "\n")
    return found


def _whole(partial: Path, batch: int) -> int:
    """How many texts are there in whole batches; what is behind them is cut off."""
    kept = partial.read_bytes().splitlines(keepends=True)
    if kept and not kept[-1].endswith(b"\n"):
        kept.pop()
    count = len(kept) - len(kept) % batch
    with partial.open("r+b") as file:
        file.truncate(sum(map(len, kept[:count])))
    return count
