"""What a model in training is worth: its loss on held-out examples, and what it says to their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nybble.core.progress import Progress, task
from nybble.data.instructions import Example, collate, prompt_of
from nybble.data.pairs import IGNORED
from nybble.nn.in_place import evaluation_mode
from nybble.nn.kv_model import recorded_kv

NEW_TOKENS, SHOWN = 48, 3


@torch.no_grad()
def held_out(model: nn.Module, rows: Sequence[Example], batch: int, progress: Progress) -> dict[str, float]:
    """Mean loss of the target tokens.

    Args:
        model: a causal language model.
        rows: examples; padding and sources have no part in the loss.
        batch: examples of a forward.
        progress: told after each.

    Returns:
        ``nll``, nats a token, and ``ppl``, its exponential.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    cached = recorded_kv(model) is not None  # what is rounded there is part of what is judged
    with evaluation_mode(model), task(progress, -(-len(rows) // batch), "held-out loss"):
        for start in range(0, len(rows), batch):
            given = {name: t.to(device) for name, t in collate(list(rows[start : start + batch])).items()}
            labels = given.pop("labels")[:, 1:]
            logits = model(**given, use_cache=cached).logits[:, :-1].float()
            losses = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total, count = total + losses.item(), count + int((labels != IGNORED).sum())
            progress.advance()
    nll = total / count
    return {"nll": nll, "ppl": math.exp(min(nll, 700.0))}


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any, rows: Sequence[Example]) -> list[dict[str, str]]:
    """What the model goes on with behind the first prompts, token by likeliest token: ``prompt``, ``text``, ``target``.

    ``target`` is how the example goes on.
    """
    asked: Any = model
    device = next(model.parameters()).device
    found = []
    room = (longest(asked.config) or 1 << 20) - NEW_TOKENS
    with evaluation_mode(model):
        for row in rows[:SHOWN]:
            prompt = prompt_of(row)
            ids = torch.tensor([prompt[-max(1, room) :]], device=device)
            made = asked.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
            spans = {"prompt": prompt, "text": made[0, ids.shape[1] :], "target": row["input_ids"][len(prompt) :]}
            found.append({name: str(tokenizer.decode(ids, skip_special_tokens=True)) for name, ids in spans.items()})
    return found


def longest(config: Any) -> int | None:
    """The most tokens that a model has positions for; None where its config names no number."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
