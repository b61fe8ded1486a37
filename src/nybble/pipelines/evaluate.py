"""Judging models: metrics of each on the same tokens, and texts that they go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint.parts import EVALUATION
from nybble.core.device import check_device
from nybble.core.errors import ModelError, UsageError, did_you_mean
from nybble.core.files import atomic_write_json
from nybble.core.guard import reading
from nybble.core.progress import Progress
from nybble.data import (
    SentenceSamples,
    TokenSamples,
    image_samples,
    load_text,
    preparation_for,
    sentence_samples,
    token_samples,
)
from nybble.eval import METRICS, classification, classify, embed, embedding_cosine, evaluate_many
from nybble.models.adapter import reads_of
from nybble.models.build.config_file import read_json
from nybble.models.sources.folder import PREPROCESSOR
from nybble.pipelines.load import load
from nybble.walk.job import check_tokens

METRICS_OF = {"sentences": ("cosine",), "images": ("top1", "agreement")}
MOST_SENTENCES = 1000
PROMPT, ANSWER = 24, 40
"""Tokens of held-out text that a sample starts from, and that each model adds."""


def run_eval(
    models: Mapping[str, str],
    data: str,
    metrics: Sequence[str] | None,
    reference: str | None,
    seq_len: int,
    samples: int | None,
    device: str,
    *,
    progress: Progress | None = None,
    texts: int = 0,
) -> dict[str, Any]:
    """Metrics of models on held-out text.

    Args:
        models: name -> what to load.
        data: a SRC.
        metrics: their names; None takes the usual ones of the kind of model.
        reference: the float model that some metrics compare with.
        seq_len: tokens of a window.
        samples: windows; None takes all.
        device: cpu or cuda.
        progress: told after each batch.
        texts: how many windows' beginnings every model goes on with, greedily; 0 for models that can't.

    Returns:
        ``models``: name -> metric -> value; ``data``: manifest of the tokens, with ``predictions``; ``samples``: a
        mapping each with ``prompt`` and every model's name.

    Raises:
        UsageError: unknown metric. NybbleError: data or models that can't be read or run.
    """
    known = [*METRICS.names(), *(name for names in METRICS_OF.values() for name in names)]
    for metric in metrics or ():
        if metric not in known:
            raise UsageError(f"unknown metric {metric!r}.{did_you_mean(metric, known)}")
    loaded: dict[str, Any] = {}
    tokenizer: Any = None
    check_device(device)
    for name, spec in models.items():
        loaded[name], tokenizer = load(spec, device=device, dense=True)
    same = next((name for name, spec in models.items() if spec == reference), None)
    float_model = None if reference is None else loaded[same] if same else load(reference, device=device)[0]
    reads = reads_of(next(iter(loaded.values())).config)
    if reads != "tokens" and metrics is not None and not set(metrics) <= set(METRICS_OF[reads]):
        raise UsageError(
            f"a model of {reads} is judged by {', '.join(METRICS_OF[reads])}; not by {', '.join(metrics)}."
        )
    if reads == "images":
        return _top1(loaded, float_model, models, data, samples)
    text = load_text(data, "evaluation", tokenizer)
    if reads == "sentences":
        sentences = sentence_samples(text, tokenizer, samples=samples or MOST_SENTENCES, seq_len=seq_len, fewer=True)
        return {"models": _cosines(loaded, float_model, sentences), "data": sentences.manifest(), "samples": []}
    metrics = metrics or (("ppl",) if reference is None else ("ppl", "kl", "agreement"))
    tokens = token_samples(text, tokenizer, samples=samples, seq_len=seq_len)
    with torch.no_grad():
        for name, spec in models.items():
            check_tokens(tokens, loaded[name])
            with reading(f"{spec} loads, but can't run; it", ModelError):
                loaded[name](tokens.input_ids[:1, :4].to(device), use_cache=False)
        found = evaluate_many(float_model, loaded, tokens.input_ids, metrics, progress=progress)
        written = go_on(loaded, tokenizer, tokens, texts)
    predictions = next(iter(found.values())).tokens
    return {
        "models": {name: result.metrics for name, result in found.items()},
        "data": tokens.manifest() | {"predictions": predictions},
        "samples": written,
    }


def _top1(
    loaded: Mapping[str, Any], reference: Any, specs: Mapping[str, str], data: str, samples: int | None
) -> dict[str, Any]:
    """Metrics of image classifiers."""
    name, spec = next(iter(specs.items()))
    preprocessor = Path(spec) / PREPROCESSOR
    wants = preparation_for(loaded[name].config, read_json(preprocessor) if preprocessor.is_file() else {})
    images = image_samples(data, wants, samples=samples)
    exact = None if reference is None else classify(reference, images.pixel_values)
    found = {
        name: classification(classify(model, images.pixel_values), exact, images.labels)
        for name, model in loaded.items()
    }
    if not all(found.values()):
        raise UsageError(f"{data} has no labels, and no float model to agree with was given as the reference.")
    return {"models": found, "data": images.manifest(), "samples": []}


def _cosines(loaded: Mapping[str, Any], reference: Any, sentences: SentenceSamples) -> dict[str, dict[str, float]]:
    """Metrics of encoders."""
    if reference is None:
        raise UsageError("an encoder's embeddings are compared with the float model's; give it as the reference.")
    exact = embed(reference, sentences.inputs)
    return {name: embedding_cosine(exact, embed(model, sentences.inputs)) for name, model in loaded.items()}


def go_on(models: Mapping[str, Any], tokenizer: Any, tokens: TokenSamples, texts: int) -> list[dict[str, str]]:
    """What every model adds to the beginnings of some windows, taking the likeliest token each time."""
    found = []
    for row in torch.arange(min(texts, len(tokens.input_ids))) * len(tokens.input_ids) // max(1, texts):
        prompt = tokens.input_ids[row, :PROMPT][None]
        sample = {"prompt": tokenizer.decode(prompt[0], skip_special_tokens=True)}
        for name, model in models.items():
            ids = prompt.to(model.device)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            sample[name] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        found.append(sample)
    return found


def judge_folder(
    out: Path, model: str, data: str, seq_len: int, device: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare what ``nybble quantize`` wrote with the float model; the result is also kept in the folder.

    Returns:
        As :func:`run_eval`, of the models ``float`` and ``quantized``.
    """
    models = {"float": model, "quantized": str(out)}
    found = run_eval(models, data, None, model, seq_len, None, device, progress=progress, texts=3)
    atomic_write_json(out / EVALUATION, found)
    return found
