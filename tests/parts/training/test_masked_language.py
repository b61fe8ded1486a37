"""The task of masked language models: BERT's masks, the model's own loss, and numbers that repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.training.test_text_tasks import BERT, model, sentences
from tests.tiny import framed_tokenizer

from nybble.core.errors import DataError, UsageError
from nybble.core.progress import Silent
from nybble.core.seeds import generator
from nybble.data.pairs import IGNORED
from nybble.data.samples import InMemory
from nybble.training.tasks import task_of
from nybble.training.tasks.masked_language import masked


def masking_tokenizer() -> Any:
    """With a mask and a pad, which are words of the others."""
    tokenizer = framed_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    return tokenizer


def text(folder: Path, count: int = 40) -> str:
    path = folder / "text.txt"
    path.write_text("\n".join(sentences(count)))
    return str(path)


def test_masks_are_berts() -> None:
    """15 % are asked for, 80, 10 and 10 % of them are the mask, another token, themselves; nothing else changes."""
    ids = torch.randint(5, 1000, (400, 100), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = labels[:, 90:] = IGNORED
    found = masked({"input_ids": ids, "labels": labels}, torch.Generator().manual_seed(1), 4, 1000)
    asked = found["labels"] != IGNORED
    assert not (asked & (labels == IGNORED)).any() and torch.equal(found["labels"][asked], ids[asked])
    assert torch.equal(found["input_ids"][~asked], ids[~asked])
    count = int(asked.sum())
    assert count / (400 * 89) == pytest.approx(0.15, abs=0.01)  # 5 standard deviations
    hidden, same = found["input_ids"][asked] == 4, found["input_ids"][asked] == ids[asked]
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert same.float().mean().item() == pytest.approx(0.1, abs=0.03)
    short = masked({"input_ids": ids[:, :3], "labels": labels[:, :3]}, torch.Generator().manual_seed(1), 4, 1000)
    assert ((short["labels"] != IGNORED).sum(1) >= 1).all()  # a batch without one has no loss


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_the_task_and_its_measures(name: str, tmp_path: Path) -> None:
    family = name.removesuffix("ForMaskedLM").lower()
    made = model(name, family, BERT)
    task, origin = task_of(made, "it"), InMemory(made.config, masking_tokenizer())
    assert type(task).__name__ == "MaskedLanguage"
    data = task.load(text(tmp_path), origin, made, 12, "evaluation")
    assert data.targets == sum(sum(row["asks"]) for row in data.rows) and data.manifest()["examples"] == len(data.rows)
    rows = data.rows
    assert all(row["asks"][0] == row["asks"][-1] == 0 for row in rows)  # <s> and </s>
    batch = task.collate(rows[:5])
    changed: Any = task.augmentation("", rows)
    first, again = (changed(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first["labels"], again["labels"]) and not torch.equal(first["labels"], batch["labels"])
    measures = task.measure(made, origin, rows, 64, Silent())
    assert measures == task.measure(made, origin, rows, 64, Silent())
    given = changed(task.collate(rows), generator(0, "held-out masks", "0"))
    with torch.no_grad():
        assert measures["nll"] == pytest.approx(float(made(**given).loss), rel=1e-5)
    shown = task.samples(made, origin, rows)
    assert any("<mask>" in each["prompt"] for each in shown) and all(each["target"] for each in shown)


def test_what_can_not_be_masked(tmp_path: Path) -> None:
    made = model("BertForMaskedLM", "bert", BERT)
    task = task_of(made, "it")
    with pytest.raises(DataError, match="no mask token"):
        task.load(text(tmp_path), InMemory(made.config, framed_tokenizer()), made, 12, "evaluation")
    origin = InMemory(made.config, masking_tokenizer())
    (tmp_path / "short.txt").write_text("ba be")
    with pytest.raises(DataError, match="no sentence"):
        task.load(str(tmp_path / "short.txt"), origin, made, 12, "evaluation")
    with pytest.raises(UsageError, match="no augmentation"):
        task.augmentation("flip", task.load(text(tmp_path), origin, made, 12, "evaluation").rows)
