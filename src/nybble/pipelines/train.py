"""``nybble train``: a method, a model and data; checkpoints, measures before and after, a page, all in one folder.

    OUT/base          the packed base, where the run made it
    OUT/adapter_*     the result, of a method that trains adapters
    OUT/merged        with ``merge``: both as one model
    OUT/training.json what was asked for and measured; OUT/report.html shows it
    OUT/logs          losses and rates for TensorBoard, where that is installed
    OUT/times.json    seconds: the one file (with the logs) that two runs of a request don't have alike

Until all is there it is OUT.partial, with ``checkpoints`` in it: a killed run goes on from the last one that is whole,
and comes to the same weights.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nybble.checkpoint.marked import is_others, is_quantized
from nybble.checkpoint.parts import REQUEST, TIMES, begun_with, cleared, same_request
from nybble.checkpoint.trained import BASE, MERGED, TRAINING
from nybble.core.device import out_of_memory
from nybble.core.errors import DataError, FileError, ModelError, NybbleError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import AtomicFolder, atomic_write_json, atomic_write_text, need_space, new_folder
from nybble.core.options import build
from nybble.core.progress import Progress, Silent
from nybble.core.seeds import preserve_global_rng
from nybble.core.versions import versions
from nybble.data.instructions import Examples, load_examples
from nybble.data.kinds import data_kind
from nybble.data.text import check_source
from nybble.models.adapter import reads_of
from nybble.models.sources.open import open_source
from nybble.nn.linear import QuantLinear
from nybble.pipelines.load import described_with_origin, load_with_origin
from nybble.pipelines.quantize import quantize
from nybble.pipelines.save import save
from nybble.quantizer import Quantizer
from nybble.report.training import render_training
from nybble.training.measures import answers, held_out, longest
from nybble.training.methods import METHODS, Method
from nybble.training.optimizers import make_optimizer
from nybble.training.settings import TrainSettings

PAGE, BEFORE = "report.html", "before.json"
CHECKPOINTS, MEMORY = "checkpoints", "memory.json"
MOST_BITS = 8


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A request that was checked."""

    method: Method
    name: str
    options: Any
    model: str
    weights: str | None
    packed: bool
    start: Path | None
    settings: TrainSettings
    tokenizer: Any
    examples: Examples
    judged: Examples | None

    def request(self) -> dict[str, Any]:
        """All that decides the result."""
        return {
            "method": self.name,
            "options": json.loads(json.dumps(asdict(self.options))),
            "model": self.model,
            "weights": self.weights,
            "packed": self.packed,
            "adapter": None if self.start is None else str(self.start),
            "settings": self.settings.request(),
            "data": self.examples.manifest(),
            "eval": None if self.judged is None else self.judged.manifest(),
            "versions": versions(),
        }


@explicit_settings()
def train(
    method: str,
    model: str | Path,
    out: str | Path,
    data: str,
    *,
    weights: str | None = None,
    packed: bool = False,
    options: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    judged_on: str | None = None,
    merge: bool = False,
    settings: TrainSettings | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a model in few bits.

    Args:
        method: one of :mod:`nybble.training.methods`.
        model: a float model, which is packed first, or a folder that holds a packed one.
        out: the folder to write; it appears whole or not at all.
        data: training examples, as :func:`nybble.data.instructions.load_examples` takes them.
        weights: quantizer line of the base, of at most 8 bits; None: the method's own.
        packed: train on the blocks of a GGUF file as they are; otherwise its weights become floats, and are packed.
        options: of the method.
        adapter: an earlier result of the method to go on from; ``model`` is the packed base that it was trained on.
        judged_on: held-out examples; loss and answers are measured on them before and after.
        merge: also write the base and what was trained as one model.
        settings: sizes, rates, device, seed; ``resume``.
        progress: told after each update.
        announce: gets lines of what is going on.

    Returns:
        What training.json says: ``method``, ``model`` ..., ``steps``, ``curve``, ``evaluation``, ``memory``; with
        ``out`` and ``seconds`` (of this call).

    Raises:
        NybbleError: bad requests, files, data; nothing is left behind, but for OUT.partial of a run that had begun to
            train: ``resume`` goes on from it.
    """
    started, settings = time.perf_counter(), settings or TrainSettings()
    say, progress = announce or _ignore, progress or Silent()
    out = new_folder(out, model)
    job = _checked(method, str(model), data, weights, packed, options or {}, adapter, judged_on, settings)
    with ExitStack() as stack:
        stack.enter_context(preserve_global_rng())
        stack.enter_context(out_of_memory(settings.device))
        need_space(out, _space(job, merge))
        partial = stack.enter_context(AtomicFolder(out, resumable=True))
        try:
            _begin(partial, job, say)
            result = _finished(partial)
            if result is None:
                base = _base(job, partial, progress, say)
                result = _trained(job, base, partial, out, merge, progress, say)
        except BaseException as error:
            _forget_unbegun(partial, error)
            raise
        seconds = time.perf_counter() - started
        _finish(partial, result, seconds)
    return {"out": str(out), **result, "seconds": seconds}


def _checked(
    method: str,
    model: str,
    data: str,
    weights: str | None,
    packed: bool,
    options: Mapping[str, Any],
    adapter: str | Path | None,
    judged_on: str | None,
    settings: TrainSettings,
) -> _Job:
    """Everything that can be wrong, before weights are read or anything is written."""
    made: Method = METHODS.get(method)
    made.needed()
    chosen = build(made.options_type, options, f"method {method!r}")
    make_optimizer(settings.optimizer, nn.Linear(64, 64), settings.lr)  # all that can be wrong with its line
    if adapter is not None and not made.continues:
        raise UsageError(f"method {method} trains no adapter; leave --adapter out.")
    base = None if adapter is None else made.base_of(Path(adapter))
    for src in (data, judged_on):
        check_source("builtin" if src is None else src)
    described, origin = described_with_origin(model)
    _check_model(model, described, settings)
    line = _line(made, model, weights, packed)
    if base is not None and line is not None:
        raise UsageError(
            f"{adapter} was trained on a packed base, and {model} would be packed anew; give that base as MODEL: "
            f"{base}."
        )
    tokenizer: Any = data_kind(reads_of(described)).tokenizer(origin)
    judged = None
    if judged_on is not None:
        judged = load_examples(judged_on, tokenizer, seq_len=settings.seq_len, part="evaluation")
    examples = load_examples(data, tokenizer, seq_len=settings.seq_len)
    for found in (examples, judged or examples):
        _check_tokens(found, described)
    return _Job(
        method=made, name=method, options=chosen, model=model, weights=line, packed=packed, settings=settings,
        tokenizer=tokenizer, start=None if adapter is None else Path(adapter), examples=examples, judged=judged,
    )  # fmt: skip


def _check_model(model: str, described: Any, settings: TrainSettings) -> None:
    if reads_of(described) != "tokens":
        raise ModelError(
            f"{model} is a {type(described).__name__}; what is trained here are causal language models of text. Others "
            "take adapters in a loop of your own: nybble.load, peft.get_peft_model."
        )
    most = longest(described.config)
    if most is not None and settings.seq_len > most:
        raise UsageError(f"seq_len is {settings.seq_len}, and {model} has positions for {most} tokens; ask for fewer.")


def _check_tokens(found: Examples, described: Any) -> None:
    largest = max(max(row["input_ids"]) for row in found.rows)
    rows = described.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise DataError(
            f"data {found.source!r} has token {largest}, and the model's embeddings have {rows} rows; is it its "
            "tokenizer?"
        )


def _line(method: Method, model: str, weights: str | None, packed: bool) -> str | None:
    """The line to pack the base in; None for a base that is packed already."""
    if packed and (Path(model).is_dir() or not open_source(model).packed_names()):
        raise UsageError(f"--packed is for GGUF files with packed blocks, which {model} is not; leave it out.")
    if packed or is_quantized(Path(model)) or is_others(Path(model)):
        if weights is not None:
            raise UsageError(f"{model} is packed already, and would be trained on as it is; leave --weights out.")
        return None
    line = method.weights if weights is None else weights
    if line is not None:
        bits = Quantizer(line).format.bits
        if bits > MOST_BITS:
            raise UsageError(f"weights {line!r} have {bits} bits; a packed base has {MOST_BITS} or fewer.")
    return line


def _space(job: _Job, merge: bool) -> int:
    """Bytes that the run may write: the base (twice, merged), three checkpoints with float32 states, the result."""
    described, _ = described_with_origin(job.model)
    layers: list[Any] = [m for m in described.modules() if isinstance(m, nn.Linear | QuantLinear)]
    shapes = [(m.out_features, m.in_features) for m in layers]
    linear, every = sum(map(math.prod, shapes)), sum(p.numel() for p in described.parameters())
    bits = 0 if job.weights is None else Quantizer(job.weights).format.bits + 1  # and scales
    base = 0 if job.weights is None else linear * bits // 8 + 2 * max(0, every - linear)
    trained = 4 * getattr(job.options, "rank", 0) * sum(map(sum, shapes))
    return base * (2 if merge else 1) + 10 * trained


def _begin(partial: Path, job: _Job, say: Callable[[str], None]) -> None:
    """Keep the request, or compare it with that of the run that is gone on with; any other is said, and cleared."""
    request = job.request()
    before = begun_with(partial) if job.settings.resume else None
    if before is not None:
        same_request(partial, before, request)
        return
    if not job.settings.resume and _made(partial):
        say(cleared(partial))
    for child in partial.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    atomic_write_json(partial / REQUEST, request)


def _finished(partial: Path) -> dict[str, Any] | None:
    """The result of a run that was killed while it cleared up."""
    if not (partial / TRAINING).exists():
        return None
    found: dict[str, Any] = json.loads((partial / TRAINING).read_text(encoding="utf-8"))
    return found


def _forget_unbegun(partial: Path, error: BaseException) -> None:
    """Remove a folder in which nothing is worth going on from: a request that was refused, or nothing made yet."""
    made = _made(partial)
    unfinished = "base.partial" in made and isinstance(error, FileError)  # a full disk, while packing
    refused = isinstance(error, NybbleError) and not unfinished
    if CHECKPOINTS not in made and (refused or not made):
        shutil.rmtree(partial, ignore_errors=True)


def _made(partial: Path) -> list[str]:
    """What there is that takes long."""
    return [name for name in (BASE, "base.partial", CHECKPOINTS) if (partial / name).exists()]


def _base(job: _Job, partial: Path, progress: Progress, say: Callable[[str], None]) -> str:
    """What to train on: the model itself, or what it is packed into."""
    if job.weights is None:
        return job.model
    folder = partial / BASE
    if not folder.exists():
        say(f"packing {job.model} in {job.weights}")
        begun = {"resume": (partial / "base.partial").exists()}
        quantize(
            job.model, "rtn", out=folder, weights=job.weights, form="native", progress=progress,
            settings={**begun, "seed": job.settings.seed, "dtype": job.settings.dtype, "device": job.settings.device},
        )  # fmt: skip
    return str(folder)


def _trained(
    job: _Job, base: str, partial: Path, out: Path, merge: bool, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    from nybble.training.loop import train as loop  # the Trainer, which takes seconds

    settings = job.settings
    loaded, _ = load_with_origin(base, dtype=settings.dtype, device=settings.device, packed=job.packed)
    loaded.requires_grad_(False)
    before = _measured_before(job, loaded, partial, progress)
    model = job.method.attach(loaded, job.options, job.start, settings.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{trainable:,} parameters train on {len(job.examples.rows):,} examples of {job.examples.targets:,} targets")
    parts = dict(job.method.parts(model))
    run = loop(model, job.examples.rows, settings, partial, progress)
    after = _measured(job, model, progress)
    job.method.save(model, partial, base if job.weights is None else str(out / BASE))
    if merge:
        shutil.rmtree(partial / MERGED, ignore_errors=True)
        merged: Any = job.method.merged(model)
        save(merged, partial / MERGED, job.tokenizer, form="native")
    request = job.request()
    memory = {**parts, **run.memory}
    return {
        **request, "steps": run.steps, "trainable": trainable, "curve": [list(point) for point in run.curve],
        "memory": memory, "evaluation": _compared(before, after), "merged": merge,
    }  # fmt: skip


def _measured(job: _Job, model: nn.Module, progress: Progress) -> dict[str, Any] | None:
    if job.judged is None:
        return None
    rows = job.judged.rows
    return {"metrics": held_out(model, rows, 8, progress), "answers": answers(model, job.tokenizer, rows)}


def _measured_before(job: _Job, model: nn.Module, partial: Path, progress: Progress) -> dict[str, Any] | None:
    """Of the base; a run that is gone on with has it."""
    if not (partial / BEFORE).exists():
        atomic_write_json(partial / BEFORE, _measured(job, model, progress))
    found: dict[str, Any] | None = json.loads((partial / BEFORE).read_text(encoding="utf-8"))
    return found


def _compared(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    if before is None or after is None:
        return None
    samples = [
        {"prompt": b["prompt"], "before": b["text"], "after": a["text"], "target": b["target"]}
        for b, a in zip(before["answers"], after["answers"], strict=True)
    ]
    return {"models": {"before": before["metrics"], "after": after["metrics"]}, "samples": samples}


def _finish(partial: Path, result: dict[str, Any], seconds: float) -> None:
    """What stays; the request is the last to go, so that a run killed here is gone on with."""
    atomic_write_json(partial / TRAINING, result)
    atomic_write_text(partial / PAGE, render_training(result))
    atomic_write_json(partial / TIMES, {"training": [seconds]})
    shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    for name in (BEFORE, MEMORY, REQUEST):
        (partial / name).unlink(missing_ok=True)


def _ignore(line: str) -> None:
    pass
