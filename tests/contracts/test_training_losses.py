"""Every loss of training: nothing to learn where student and teacher agree, something where they don't."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from nybble.core.errors import ModelError
from nybble.training.losses import LOSSES, Lesson, Loss

NAMES = LOSSES.names()
TAUGHT = [name for name in NAMES if LOSSES.get(name).taught]
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]),
    "attention_mask": REAL,
    "labels": torch.tensor([1, 2]),
}


@cache
def network(seed: int) -> Any:
    """A small BERT with a head of three classes, in float64."""
    make: Any = BertConfig
    config = make(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        max_position_embeddings=8, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = BertForSequenceClassification(config)
    return made.double().eval()


def lesson(made: Loss, student: Any, teacher: Any) -> Lesson:
    asked: dict[str, Any] = dict.fromkeys(made.outputs, True)
    known = None if teacher is None else teacher(**BATCH, **asked)
    counted = torch.ones(2, dtype=torch.bool)
    return Lesson(student=student(**BATCH, **asked), teacher=known, batch=BATCH, counted=counted)


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", TAUGHT)
def test_what_a_teacher_says(name: str) -> None:
    made: Loss = LOSSES.make(name, {})
    student, teacher = network(0), network(1)
    given = lesson(made, student, student)
    found = made(given)
    assert found.shape == () and found.item() == pytest.approx(made.entropy(given).item(), abs=1e-12)
    assert all(g.abs().max() < 1e-12 for g in gradients(found, student))
    given = lesson(made, student, teacher)
    found = made(given)
    assert found.item() > made.entropy(given).item() + 1e-3
    assert any(g.abs().max() > 1e-3 for g in gradients(made(lesson(made, student, teacher)), student))
    assert not gradients(made(lesson(made, student, teacher)), teacher)  # it is told, and tells nobody
    with pytest.raises(ModelError, match=f"loss {name} compares with a teacher, and there is none"):
        made(lesson(made, student, None))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAUGHT])
def test_what_needs_no_teacher(name: str) -> None:
    made: Loss = LOSSES.make(name, {})
    found = made(lesson(made, network(0), None))
    assert found.shape == () and any(g.abs().max() > 1e-3 for g in gradients(found, network(0)))
    assert found.item() == made(lesson(made, network(0), network(1))).item()
