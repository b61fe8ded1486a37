"""Log probabilities of answers behind prompts, and each question's metrics.

    lp(c | p)  = sum over the tokens of c of log softmax(logits), with p + c as one text       float32
    loss       = -log( exp lp(right) / sum of exp lp )              of a completion: -lp
    coverage   = sum of exp lp: what of all probability the answers on offer get
    log odds   = o(prompt) - o(other_prompt), o = log softmax over the two classes' tokens [0] - [1]; its negative where
                 the second class is the right one

Source: arXiv 2306.09479, section 2 and its evaluation pipeline. Where we differ: a prompt that is too long is refused,
not cut; which tokens belong to an answer is read from the tokenizer's offsets in the whole text, not guessed from the
answer alone, and a token that spans the border is refused; classes of log odds have to be single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError
from nybble.core.options import at_least_one
from nybble.core.progress import Progress, Silent, task
from nybble.eval._logits import Predictor
from nybble.eval.inverse_scaling.examples import Question, Questions
from nybble.nn.config import config_of


@dataclass(frozen=True)
class _Text:
    """``ids``: tokens of prompt and answer. ``start``: the first of the answer's."""

    ids: list[int]
    start: int


@torch.no_grad()
def score(
    model: nn.Module, tokenizer: Any, asked: Questions, *, batch: int = 8, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Each question's metrics, in their order.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its own.
        asked: the questions.
        batch: texts a forward takes, padded behind their ends, where no real token sees it. Only a quantizer that
            measures several texts at once gives other numbers than with 1.
        progress: told after each batch.

    Returns:
        ``classification``: ``loss`` (nats), ``correct``, ``correct_norm`` (by log probability a
        character of the class, as lm-evaluation-harness has it), ``coverage``,
        ``logprobs``; ``sequence_prob``: ``loss``, ``coverage``; ``logodds``: ``logodds``, ``correct`` (at the other
        prompt), ``coverage``.

    Raises:
        DataError: a row that doesn't fit the model or its tokenizer; names it. ModelError: NaN logits; names the row.
    """
    at_least_one(batch=batch)
    if asked.kind == "logodds":
        return _odds(model, tokenizer, asked, batch, progress or Silent())
    texts, rows = [], []
    for number, row in enumerate(asked.rows):
        for answer in row.answers:
            texts.append(_joined(tokenizer, model, row.prompt, answer, f"{asked.source}, row {number + 1}"))
            rows.append(number)
    tails = [text.ids[text.start :] for text in texts]
    found = _of_tails(model, texts, tails, [f"{asked.source}, row {n + 1}" for n in rows], batch, progress or Silent())
    logprobs: list[list[float]] = [[] for _ in asked.rows]
    for number, value in zip(rows, found, strict=True):
        logprobs[number].append(value)
    made = _sequence if asked.kind == "sequence_prob" else _classes
    return [made(row, values) for row, values in zip(asked.rows, logprobs, strict=True)]


def _sequence(row: Question, logprobs: Sequence[float]) -> dict[str, Any]:
    return {"loss": -logprobs[0], "coverage": math.exp(logprobs[0])}


def _classes(row: Question, logprobs: Sequence[float]) -> dict[str, Any]:
    total = float(torch.tensor(logprobs, dtype=torch.float64).logsumexp(0))
    by_length = [value / len(text) for value, text in zip(logprobs, row.answers, strict=True)]
    return {
        "loss": max(0.0, total - logprobs[row.right]), "correct": _likeliest(logprobs) == row.right,
        "correct_norm": _likeliest(by_length) == row.right, "coverage": math.exp(min(0.0, total)),
        "logprobs": [*logprobs],
    }  # fmt: skip


def _likeliest(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _odds(model: nn.Module, tokenizer: Any, asked: Questions, batch: int, progress: Progress) -> list[dict[str, Any]]:
    prompts: list[str] = []
    tokens: list[list[int]] = []
    where: list[str] = []
    for number, row in enumerate(asked.rows, 1):
        name = f"{asked.source}, row {number}"
        assert row.other_prompt is not None
        pair = [_single(tokenizer, text, name) for text in row.answers]
        for prompt in (row.prompt, row.other_prompt):
            prompts.append(prompt)
            tokens.append(pair)
            where.append(name)
    texts = [_alone(tokenizer, model, prompt, name) for prompt, name in zip(prompts, where, strict=True)]
    found = _next(model, texts, tokens, where, batch, progress)
    rows = []
    for number, row in enumerate(asked.rows):
        (first, _), (second, coverage) = found[2 * number], found[2 * number + 1]
        sign = -1.0 if row.right else 1.0
        correct = (second < 0) if row.right else (second >= 0)  # a tie goes to the first class
        rows.append({"logodds": sign * (first - second), "correct": correct, "coverage": coverage})
    return rows


# ------------------------------------------------------------------------------------------------------------ tokens
def _joined(tokenizer: Any, model: nn.Module, prompt: str, answer: str, where: str) -> _Text:
    """A prompt with an answer as one text, and where the answer's tokens begin."""
    ids, spans = _encoded(tokenizer, prompt + answer, where)
    border = len(prompt)
    crossing = [span for span in spans if span is not None and span[0] < border < span[1]]
    if crossing:
        begin, end = crossing[0]
        raise DataError(
            f"{where}: the tokenizer joins the prompt's end and the answer's beginning into one token, "
            f"{(prompt + answer)[begin:end]!r}; begin answers with a space."
        )
    inside = [index for index, span in enumerate(spans) if span is not None and span[1] > border]
    if not inside:
        raise DataError(f"{where}: the answer {answer!r:.40} has no tokens.")
    start, stop = inside[0], inside[-1] + 1  # what the tokenizer puts behind a text isn't the answer's
    if start == 0:
        raise DataError(f"{where}: nothing stands in front of the answer, so nothing predicts its first token.")
    return _fitting(model, _Text(ids[:stop], start), where)


def _alone(tokenizer: Any, model: nn.Module, prompt: str, where: str) -> _Text:
    ids, spans = _encoded(tokenizer, prompt, where)
    stop = max((index for index, span in enumerate(spans) if span is not None), default=-1) + 1
    if not stop:
        raise DataError(f"{where}: a prompt has no tokens.")
    return _fitting(model, _Text(ids[:stop], stop), where)


def _encoded(tokenizer: Any, text: str, where: str) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Tokens, and the part of the text that each stands for; None of what the tokenizer adds."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: {type(tokenizer).__name__} doesn't tell where its tokens begin; use a fast tokenizer."
        )
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    added = found["special_tokens_mask"]
    spans = [None if mark else tuple(span) for mark, span in zip(added, found["offset_mapping"], strict=True)]
    return list(found["input_ids"]), spans


def _single(tokenizer: Any, text: str, where: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DataError(f"{where}: log odds are of single tokens; {text!r:.40} is {len(ids)} of this tokenizer.")
    return int(ids[0])


def _fitting(model: nn.Module, text: _Text, where: str) -> _Text:
    most = getattr(config_of(model), "max_position_embeddings", None)
    if most is not None and len(text.ids) > most:
        raise DataError(f"{where}: {len(text.ids)} tokens; the model reads {most}. Leave such rows out.")
    return text


# ---------------------------------------------------------------------------------------------------- probabilities
def _of_tails(
    model: nn.Module, texts: Sequence[_Text], tails: Sequence[list[int]], where: Sequence[str], batch: int,
    progress: Progress,
) -> list[float]:  # fmt: skip
    """The sum of log probabilities of each text's tail."""
    found: dict[int, float] = {}
    for index, logits in _each(model, texts, batch, progress, [len(t.ids) - t.start for t in texts]):
        wanted = torch.tensor(tails[index], device=logits.device)
        value = logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum()
        found[index] = _real(float(value), where[index])
    return [found[index] for index in range(len(texts))]


def _next(
    model: nn.Module, texts: Sequence[_Text], tokens: Sequence[list[int]], where: Sequence[str], batch: int,
    progress: Progress,
) -> list[tuple[float, float]]:  # fmt: skip
    """Log odds of two tokens behind each text, and the probability of both."""
    grown = [_Text([*text.ids, text.ids[-1]], text.start) for text in texts]  # a token more: its own isn't looked at
    found: dict[int, tuple[float, float]] = {}
    for index, logits in _each(model, grown, batch, progress, [1] * len(texts)):
        pair = logits[0].log_softmax(-1)[tokens[index]].double()
        found[index] = _real(float(pair[0] - pair[1]), where[index]), float(pair.exp().sum())
    return [found[index] for index in range(len(texts))]


def _each(model: nn.Module, texts: Sequence[_Text], batch: int, progress: Progress, counts: Sequence[int]) -> Any:
    """Of each text, texts of like lengths together: its number, and float32 logits [count, V] from its start on."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].ids), i))
    longest = max(texts, key=lambda text: len(text.ids)).ids
    spread = torch.tensor([[min(min(text.ids) for text in texts), max(max(text.ids) for text in texts)]])
    predictor = Predictor(model, torch.cat([spread, torch.tensor([longest])], dim=1))
    with task(progress, len(texts), "answers") as bar:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            width = max(len(texts[i].ids) for i in part)
            ids = torch.tensor([texts[i].ids + [0] * (width - len(texts[i].ids)) for i in part])
            logits_of = predictor.predict(ids)
            for place, index in enumerate(part):
                first = place * (width - 1) + texts[index].start - 1
                logits: Tensor = logits_of(first, first + counts[index]).float()
                yield index, logits
            bar.advance(len(part))


def _real(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ModelError(f"{where}: the log probability is {value}. Look for NaN weights, or try another dtype.")
    return value
