"""Judging models: metrics of each on the same samples, and texts that they go on with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.calibration.synthesis import is_synthetic
from nybble.checkpoint.parts import EVALUATION
from nybble.core.device import check_device
from nybble.core.errors import ModelError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import atomic_write_json
from nybble.core.guard import reading
from nybble.core.options import at_least_one
from nybble.core.progress import Progress, Silent
from nybble.data import InMemory, Origin, Samples
from nybble.data.kinds import DataKind, data_kind
from nybble.data.text import check_source
from nybble.eval._logits import evaluating
from nybble.eval.judges import Judge, Panel, check_metrics, chosen_metrics, judge_of
from nybble.kv_format import KVFormat
from nybble.models.adapter import reads_of
from nybble.nn.config import config_of
from nybble.nn.integer.model import in_integers
from nybble.nn.kv_model import recorded_kv, use_quantized_cache
from nybble.pipelines.load import described_with_origin, load_with_origin

Spec = str | nn.Module
"""What to load, or a model in memory."""


@explicit_settings()
def run_eval(
    models: Mapping[str, Spec],
    data: str | Samples = "builtin",
    *,
    metrics: Sequence[str] | None = None,
    reference: Spec | None = None,
    seq_len: int = 512,
    samples: int | None = None,
    device: str = "cpu",
    texts: int = 0,
    integer: bool = False,
    kv: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Metrics of models on held-out data, as the judge of their kind of data finds them.

    Args:
        models: name -> what to load, or a model in memory, which stays where it is; all of one kind.
        data: a SRC, or samples that are ready.
        metrics: their names; None takes the usual ones of the kind of model.
        reference: the float model that some metrics compare with.
        seq_len: tokens of a window or sentence.
        samples: how many; None takes what the judge takes, most often all.
        device: cpu or cuda.
        texts: how many windows' beginnings every model goes on with, greedily; 0 for models that can't.
        integer: let quantized classifiers, and transformers in blocks, calculate in integers alone
            (:mod:`nybble.nn.integer`); the reference stays as it is.
        kv: what the models cache keys and values in, a line of :class:`nybble.kv_format.KVFormat`; ``none`` is float.
            Default is what a quantized folder says, else float. The reference caches as it does.
        progress: told after each batch.

    Returns:
        ``models``: name -> metric -> value; ``data``: manifest of the samples, with ``predictions`` where there are
        any; ``samples``: a mapping each with ``prompt`` and every model's name.

    Raises:
        UsageError: unknown metric, models of several kinds. NybbleError: data or models that can't be read or run.
    """
    cached = _checked(models, data, metrics, reference, kv)
    check_device(device)
    at_least_one(seq_len=seq_len, samples=samples)
    # All that can be wrong with the request is found before weights are read.
    seen = {name: _described(spec) for name, spec in models.items()}
    key, origin = _kind_of({name: model for name, (model, _) in seen.items()}), [*seen.values()][-1][1]
    names = chosen_metrics(key, metrics, reference is not None)
    kind, judge = data_kind(key), judge_of(key)
    made = kind.prepare(data, origin, judge.wanted(samples, seq_len)) if isinstance(data, str) else data
    opened = {name: _opened(spec, device, dense=True) for name, spec in models.items()}
    loaded = {name: model for name, (model, _) in opened.items()}
    own = integer or cached is not None  # the models run otherwise than the reference, which can't be one of them
    same = None if own else next((name for name, spec in models.items() if spec == reference), None)
    float_model, reference_origin = None, None
    if reference is not None:
        float_model, reference_origin = _opened(reference, device) if same is None else opened[same]
    everyone = [*loaded.values()] if float_model is None else [float_model, *loaded.values()]
    with evaluating(*everyone), _changed(loaded.values(), float_model, cached, integer):
        for name, model in loaded.items():
            spec = models[name]
            made = kind.fitted(made, model)
            _check_runs(spec if isinstance(spec, str) else name, model, kind, judge, made)
        panel = Panel(
            models=loaded, reference=float_model, samples=made, metrics=names,
            origins={name: origin for name, (_, origin) in opened.items()},
            reference_origin=reference_origin,
        )  # fmt: skip
        verdict = judge.judge(panel, progress or Silent())
        written = judge.texts(loaded, origin, made, texts)
    return {"models": verdict.metrics, "data": {**made.manifest(), **verdict.counts}, "samples": written}


def _checked(
    models: Mapping[str, Spec],
    data: str | Samples,
    metrics: Sequence[str] | None,
    reference: Spec | None,
    kv: str | None,
) -> KVFormat | None:
    """Refuse what can be told from the request alone; the cache's format."""
    if not models:
        raise UsageError("nothing to evaluate: give at least one model.")
    check_metrics(metrics, reference is not None)
    if isinstance(data, str):
        check_source(data)
    if is_synthetic(data):
        raise UsageError("synthesised inputs calibrate, and nothing says what is right for them; judge on real data.")
    return None if kv is None else KVFormat.parse(kv)


@contextmanager
def _changed(models: Iterable[Any], reference: Any, kv: KVFormat | None, integer: bool) -> Iterator[None]:
    """Within, the models run as the request says, and the reference as it is."""
    with ExitStack() as stack:
        for model in models if integer or kv is not None else ():
            if model is reference:
                raise UsageError("the reference is among the models, in memory: it can't run in two ways at once.")
            if kv is not None:
                stack.enter_context(_caching(model, kv))
            if integer:
                stack.enter_context(in_integers(model))
        yield


@contextmanager
def _caching(model: Any, kv: KVFormat) -> Iterator[None]:
    """Within, a model caches in a format; afterwards as it did."""
    before = recorded_kv(model)
    use_quantized_cache(model, kv if kv.stores else None)
    try:
        yield
    finally:
        use_quantized_cache(model, before)


def _opened(spec: Spec, device: str, dense: bool = False) -> tuple[Any, Origin]:
    """A model, and where it comes from."""
    return _in_memory(spec) if isinstance(spec, nn.Module) else load_with_origin(spec, device=device, dense=dense)


def _described(spec: Spec) -> tuple[Any, Origin]:
    """As :func:`_opened`, of what has to be loaded without weights."""
    return _in_memory(spec) if isinstance(spec, nn.Module) else described_with_origin(spec)


def _in_memory(spec: nn.Module) -> tuple[Any, Origin]:
    from nybble.models.network import as_model  # transformers, which takes seconds

    model: Any = as_model(spec) if config_of(spec) is None else spec
    return model, InMemory(model.config)


def _kind_of(models: Mapping[str, Any]) -> str:
    """The kind of data that all models read."""
    kinds = {name: reads_of(model) for name, model in models.items()}
    if len(set(kinds.values())) > 1:
        raise UsageError(
            "models of several kinds can't be judged on the same data: "
            + ", ".join(f"{name} reads {kind}" for name, kind in kinds.items())
            + ". Judge them apart."
        )
    return next(iter(kinds.values()))


def _check_runs(what: str, model: Any, kind: DataKind, judge: Judge, samples: Samples) -> None:
    """Refuse samples that don't fit, and models that load but fail."""
    kind.check(samples, model)
    first = next(chain(model.parameters(), model.buffers()))  # which is all that an integer transformer has
    dtype = first.dtype if first.is_floating_point() else torch.float32
    with reading(f"{what} loads, but can't run; it", ModelError):
        *short, whole = [
            {name: t.to(dtype) if t.is_floating_point() else t for name, t in probe.items()}
            for probe in kind.probes(samples.inputs, first.device)
        ]
        for given in short:
            with suppress(Exception):
                judge.call(model, given)
                return
        judge.call(model, whole)


def judged_on(model: str, data: str, *, seq_len: int, samples: int | None = None) -> Samples:
    """The samples on which :func:`judge_folder` will compare a model with its float one, before there is any.

    ``samples``: how many; None takes what the judge takes.

    Raises:
        NybbleError: data that can't be read or is too little, or a kind of model that nothing judges.
    """
    found, origin = described_with_origin(model)
    key = reads_of(found)
    return data_kind(key).prepare(data, origin, judge_of(key).wanted(samples, seq_len))


def judge_folder(
    out: Path, model: str, data: str | Samples, *, seq_len: int = 512, device: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare what ``nybble quantize`` wrote with the float model; the result is also kept in the folder.

    Returns:
        As :func:`run_eval`, of the models ``float`` and ``quantized``.
    """
    models = {"float": model, "quantized": str(out)}
    found = run_eval(models, data, reference=model, seq_len=seq_len, device=device, texts=3, progress=progress)
    atomic_write_json(out / EVALUATION, found)
    return found
