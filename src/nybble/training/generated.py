"""Text that a language model makes of itself, to be trained on where its own data can't be had.

Liu et al. 2023, "LLM-QAT", arXiv:2305.17888, section 3.1: a first token from the vocabulary, the next few as the model
likes them best, for they decide what it is about, and the rest drawn, for variety. ``greedy`` and ``sample`` are the
paper's other two ways: all of it one or the other.

Each text has random numbers of its own, so that none depends on what else is in its batch (but where a sum of another
order tips a tie).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.options import at_least_one, check_types
from nybble.core.seeds import generator
from nybble.core.shapes import Int64
from nybble.nn.in_place import evaluation_mode
from nybble.nn.kv_model import cache_argument
from nybble.recipes.training import SELF


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How texts are made.

    Attributes:
        count: of texts. length: most tokens of one, the first included; it may end before.
        strategy: ``hybrid``, ``greedy`` or ``sample``.
        likeliest: how many tokens are there, the first included, before any is drawn: text by text another of these.
        temperature: of the distribution. top_k: of how many tokens one is drawn.
        batch: texts at a time. seed: of first tokens, and of what is drawn.
    """

    count: int = 1024
    length: int = 256
    strategy: Literal["hybrid", "greedy", "sample"] = "hybrid"
    likeliest: tuple[int, ...] = (3, 4, 5)
    temperature: float = 1.0
    top_k: int = 50
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "generation")
        at_least_one(count=self.count, top_k=self.top_k, batch=self.batch)
        if not self.likeliest or min(self.likeliest) < 1:
            raise UsageError(f"likeliest is {list(self.likeliest)}; give lengths of 1 or more.")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; it must be a number above 0.")
        most = max(self.likeliest) if self.strategy == "hybrid" else 1
        if self.length <= most:
            raise UsageError(f"length is {self.length}, and the first {most} tokens are given; ask for more.")


def own_texts(src: str, length: int, seed: int) -> Generation | None:
    """What ``self`` or ``self:COUNT`` asks for; None of any other SRC.

    Raises:
        UsageError: a count that is no number.
    """
    word, _, count = src.partition(":")
    if word != SELF:
        return None
    if src != SELF and not count.isdecimal():
        raise UsageError(f"data {src!r}: self is followed by the number of texts, as in self:4096.")
    made = Generation(length=length, seed=seed)
    return made if src == SELF else replace(made, count=int(count))


@dataclass(frozen=True)
class First:
    """How a text begins: its first token, and how many there are before any is drawn."""

    token: int
    likeliest: int


def beginnings(options: Generation, vocabulary: Sequence[int]) -> list[First]:
    """The beginnings of all texts: every token of the vocabulary with every length, in a random order, then again."""
    lengths = options.likeliest if options.strategy == "hybrid" else (1,)
    every = [First(token, length) for length in lengths for token in vocabulary]
    if not every:
        raise ModelError("the model's vocabulary has nothing but special tokens, so no text can begin.")
    order = torch.randperm(len(every), generator=generator(options.seed, "generated", "order")).tolist()
    return [every[order[i % len(order)]] for i in range(options.count)]


def known_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that a text may have: those of the tokenizer that the model has a row for; it may have more rows."""
    rows = model.get_input_embeddings().weight.shape[0]
    return sorted(token for token in set(tokenizer.get_vocab().values()) if token < rows)


def vocabulary_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that a text may begin with: known ones that are not special."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return [token for token in known_tokens(model, tokenizer) if token not in special]


@torch.no_grad()
def generated(
    model: nn.Module, tokenizer: Any, options: Generation, start: int = 0, every: int = 1
) -> Iterator[list[tuple[int, list[int]]]]:
    """Texts as token ids, batch by batch: each with its number.

    Args:
        model: a causal language model, on its device.
        tokenizer: of it; no other tokens than it knows are made.
        options: how.
        start: the number of the first text, a multiple of ``options.batch``: those before it are there already.
        every: of how many batches from there on one is made: others make the rest.

    Raises:
        ModelError: the model generates no text.
    """
    made: Any = model
    check_generates(made)
    firsts, ends = beginnings(options, vocabulary_of(model, tokenizer)), _ends(made)
    barred = _barred(made, ends.union(known_tokens(model, tokenizer)))
    with evaluation_mode(model):
        for begin in range(start, options.count, every * options.batch):
            some = range(begin, min(begin + options.batch, options.count))
            ids = _batch(made, [firsts[i] for i in some], some, ends, barred, options)
            yield list(zip(some, ids, strict=True))


def check_generates(model: Any) -> None:
    """Refuse a model that makes no texts of itself.

    Raises:
        ModelError: it doesn't.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ModelError(f"a {type(model).__name__} generates no text of itself; causal language models do.")


def _barred(model: Any, known: frozenset[int]) -> Tensor | None:
    """Which logits are of no token, so that text of it couldn't be read; None: none."""
    width = getattr(model.get_output_embeddings(), "out_features", 0)
    found = torch.ones(width, dtype=torch.bool, device=next(model.parameters()).device)
    found[[token for token in known if token < width]] = False
    return found if bool(found.any()) else None


def _batch(
    model: Any,
    firsts: list[First],
    numbers: Sequence[int],
    ends: frozenset[int],
    barred: Tensor | None,
    options: Generation,
) -> list[list[int]]:
    """Some texts of one batch."""
    device, word = next(model.parameters()).device, cache_argument(type(model)) or "past_key_values"
    likeliest = torch.tensor([first.likeliest for first in firsts], device=device)
    drawn = _numbers(options, numbers).to(device) if options.strategy != "greedy" else None
    stops = torch.tensor(sorted(ends), device=device)
    ids = torch.tensor([[first.token] for first in firsts], device=device)
    found, done, cache = [ids], torch.zeros(len(firsts), dtype=torch.bool, device=device), None
    for at in range(1, options.length):
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **({} if cache is None else {word: cache}))
        logits, cache = out.logits[:, -1].float(), getattr(out, word)
        if barred is not None:
            logits.masked_fill_(barred, float("-inf"))
        best = logits.argmax(-1)
        if drawn is not None:
            best = torch.where(likeliest > at, best, _draw(logits, drawn[:, at - 1], options))
        ids = best[:, None]
        found.append(ids)
        done |= torch.isin(best, stops)
        if at % 16 == 0 and bool(done.all()):  # a look waits for the device
            break
    rows: list[list[int]] = torch.cat(found, 1).tolist()
    return [_until(row, ends) for row in rows]


def _draw(logits: Tensor, at: Tensor, options: Generation) -> Int64[Tensor, " texts"]:
    """The token at which the sum of the likeliest ones' probabilities, in their order, passes ``at`` (0 to 1)."""
    top, tokens = logits.topk(min(options.top_k, logits.shape[-1]), -1)
    sums = (top / options.temperature).softmax(-1).cumsum(-1)
    number = (sums < at[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(1, number.clamp(max=top.shape[-1] - 1))[:, 0]


def _numbers(options: Generation, numbers: Sequence[int]) -> Tensor:
    """Each text's own random numbers, [texts, length - 1]."""
    own = [generator(options.seed, "generated", str(number)) for number in numbers]
    return torch.stack([torch.rand(options.length - 1, generator=each) for each in own])


def _until(row: list[int], ends: frozenset[int]) -> list[int]:
    """The row up to what ends it, which is left out."""
    for at, token in enumerate(row):
        if token in ends and at:
            return row[:at]
    return row


def _ends(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)
