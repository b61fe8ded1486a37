"""Inverse scaling: what is read, what is calculated, and what a curve is called."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from nybble.core.errors import DataError, ModelError, UsageError
from nybble.eval.inverse_scaling.examples import Questions, questions, read_questions
from nybble.eval.inverse_scaling.lookalikes import LOOKALIKES
from nybble.eval.inverse_scaling.scoring import score
from nybble.eval.inverse_scaling.tasks import TASKS, find_questions, made_here
from nybble.eval.inverse_scaling.trends import mcnemar, paired, rank_correlation, summary, trend

WORDS = ["is", " it", " so", " yes", " no", " not", " at", " all", "?", "yes"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\?"), "isolated")
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=found)


class Bigram(nn.Module):
    """Each token by the one before it; ``shift`` is added to all logits."""

    def __init__(self, shift: float = 0.0, level: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.zeros(10, 10) if level else torch.randn(10, 10, generator=generator)
        self.table = nn.Parameter(table + shift, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def logprob(*words: str) -> float:
    """Of every word but the first."""
    ids = [WORDS.index(word) for word in words]
    table = Bigram().table.double().log_softmax(-1)
    return sum(float(table[before, after]) for before, after in itertools.pairwise(ids))


def asked(*rows: dict[str, Any]) -> Questions:
    return questions(rows, "q", "these")


CLASSES = {"prompt": "is it", "classes": [" yes", " not at all"], "answer_index": 1}
ODDS = {"prompt": "is it", "other_prompt": "is it so", "classes": [" yes", " no"], "answer_index": 0}


def test_classes_by_hand(tokenizer: Any) -> None:
    """Several tokens a class; the loss is of the right one among those on offer, the accuracy also by its length."""
    (row,) = score(Bigram(), tokenizer, asked(CLASSES))
    first, second = logprob(" it", " yes"), logprob(" it", " not", " at", " all")
    total = math.log(math.exp(first) + math.exp(second))
    assert row["loss"] == pytest.approx(total - second, abs=1e-6)
    assert row["coverage"] == pytest.approx(math.exp(total), rel=1e-6)
    assert row["logprobs"] == pytest.approx([first, second], abs=1e-6)
    assert row["correct"] == (second > first)
    assert row["correct_norm"] == (second / len(" not at all") > first / len(" yes"))
    other = score(Bigram(), tokenizer, asked({**CLASSES, "answer_index": 0}))[0]
    assert math.exp(-row["loss"]) + math.exp(-other["loss"]) == pytest.approx(1)


def test_a_completion_by_hand(tokenizer: Any) -> None:
    (row,) = score(Bigram(), tokenizer, asked({"prompt": "is", "completion": " it so"}))
    assert row["loss"] == pytest.approx(-logprob("is", " it", " so"), abs=1e-6)


def test_log_odds_by_hand(tokenizer: Any) -> None:
    """Of the next token after each prompt; swapped prompts and the other answer turn the sign."""

    def odds(last: str) -> float:
        return logprob(last, " yes") - logprob(last, " no")

    (row,) = score(Bigram(), tokenizer, asked(ODDS))
    assert row["logodds"] == pytest.approx(odds(" it") - odds(" so"), abs=1e-6)
    assert row["correct"] == (odds(" so") > 0)
    assert row["coverage"] == pytest.approx(
        math.exp(logprob(" so", " yes")) + math.exp(logprob(" so", " no")), rel=1e-5
    )
    swapped = {**ODDS, "prompt": ODDS["other_prompt"], "other_prompt": ODDS["prompt"]}
    turned = score(Bigram(), tokenizer, asked(swapped, {**ODDS, "answer_index": 1}))
    assert [each["logodds"] for each in turned] == pytest.approx([-row["logodds"]] * 2, abs=1e-6)
    told = summary(asked(swapped, ODDS), [turned[0], row])
    assert told["logodds"] == pytest.approx(0, abs=1e-6)
    assert told["absolute_logodds"] == pytest.approx(abs(row["logodds"]), abs=1e-6)


def test_a_uniform_model(tokenizer: Any) -> None:
    """Loss is that of chance, ties go to the first, nothing moves log odds."""
    rows = asked({**CLASSES, "classes": [" yes", " no"]}, {**CLASSES, "classes": [" no", " yes"], "answer_index": 0})
    found = score(Bigram(level=True), tokenizer, rows)
    told = summary(rows, found)
    assert told["loss"] == pytest.approx(math.log(2)) == told["loss_chance"]
    assert [row["correct"] for row in found] == [False, True]
    assert told["acc_chance"] == 0.5
    assert score(Bigram(level=True), tokenizer, asked(ODDS))[0]["logodds"] == 0


@pytest.mark.parametrize("change", [{"batch": 1}, {"batch": 4}, {"shift": 3.0}], ids=str)
def test_what_changes_nothing(tokenizer: Any, change: dict[str, Any]) -> None:
    """How many texts a forward takes, and a constant on all logits."""
    rows = asked(*[{**CLASSES, "prompt": "is" + " it" * n} for n in range(1, 8)])
    before = score(Bigram(), tokenizer, rows, batch=16)
    after = score(Bigram(change.get("shift", 0.0)), tokenizer, rows, batch=change.get("batch", 16))
    for one, other in zip(before, after, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)


def test_csv_and_jsonl_are_the_same(tmp_path: Path) -> None:
    """A CSV has its classes as Python writes a list."""
    with (tmp_path / "q.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CLASSES)
        writer.writeheader()
        writer.writerow(CLASSES)
    (tmp_path / "q.jsonl").write_text(json.dumps(CLASSES) + "\n")
    assert read_questions(tmp_path / "q.csv").rows == read_questions(tmp_path / "q.jsonl").rows


WRONG: dict[str, dict[str, Any]] = {
    "there is no answer_index": {"prompt": "a", "classes": [" a", " b"]},
    "0 to 1; got 2": {**CLASSES, "answer_index": 2},
    "got -1": {**CLASSES, "answer_index": -1},
    "two or more texts": {**CLASSES, "classes": [" yes"]},
    "a list of texts": {**CLASSES, "classes": "yes or no"},
    "of two classes; got 3": {**ODDS, "classes": [" a", " b", " c"]},
    "the completion is empty": {"prompt": "a", "completion": ""},
    "is a text; got 3": {**CLASSES, "prompt": 3},
    "columns text; wanted": {"text": "a"},
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_rows_are_named(says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        asked(WRONG[says])
    assert "these" in str(caught.value)


def test_wrong_rows_of_a_model(tokenizer: Any) -> None:
    """What the tokenizer or the model can't do with a row."""
    with pytest.warns(UserWarning, match="begin without a space"), pytest.raises(DataError, match=r"row 2.*one token"):
        score(Bigram(), tokenizer, asked(CLASSES, {**CLASSES, "classes": ["yes", "no"]}))
    with pytest.raises(DataError, match="row 1: log odds are of single tokens; ' not at' is 2"):
        score(Bigram(), tokenizer, asked({**ODDS, "classes": [" yes", " not at"]}))
    with pytest.raises(DataError, match="nothing stands in front"):
        score(Bigram(), tokenizer, asked({**CLASSES, "prompt": ""}))
    short: Any = Bigram()
    short.config = LlamaConfig(max_position_embeddings=3)
    with pytest.raises(DataError, match="row 1: 5 tokens; the model reads 3"):
        score(short, tokenizer, asked(CLASSES))
    broken = Bigram()
    broken.table[3] = math.nan
    with pytest.raises(ModelError, match="row 2: the log probability is nan"):
        score(broken, tokenizer, asked(CLASSES, {**CLASSES, "prompt": "is it yes"}))


CURVES = {
    "inverse": (0.5, 0.45, 0.4, 0.3, 0.2),
    "U-shaped": (0.5, 0.4, 0.3, 0.5, 0.7),
    "positive": (0.5, 0.6, 0.7, 0.8, 0.9),
    "inverted-U": (0.4, 0.6, 0.7, 0.5, 0.3),
    "flat": (0.50, 0.51, 0.49, 0.50, 0.51),
}


@pytest.mark.parametrize("label", CURVES)
def test_shapes(label: str) -> None:
    assert trend(CURVES[label], [0.02] * 5)["label"] == label


def test_an_interior_point_that_is_below_one_end_alone_is_no_valley() -> None:
    found = trend((0.5, 0.3, 0.32), [0.02] * 3)
    assert found["label"] == "inverse"
    assert found["valley"] == pytest.approx(0.02 / math.hypot(0.02, 0.02))
    with pytest.raises(UsageError, match="two or more points"):
        trend([0.5], [0.1])


def test_rank_correlation() -> None:
    """An order that every draw keeps is certain; ties share ranks; noise is not."""
    falling = torch.tensor([[0.9, 0.8, 0.9], [0.5, 0.4, 0.6], [0.1, 0.3, 0.2]])
    assert rank_correlation([1, 2, 4], falling) == pytest.approx({"rho": -1, "low": -1, "high": -1})
    noise = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    found = rank_correlation([1, 2, 3, 4], noise)
    assert found["low"] < found["rho"] < found["high"]
    tied = rank_correlation([1, 2, 3], torch.tensor([[1.0], [1.0], [2.0]]))
    assert tied["rho"] == pytest.approx(math.sqrt(3) / 2)
    with pytest.raises(UsageError, match="two or more sizes"):
        rank_correlation([1, 1], falling[:2])


def test_row_by_row() -> None:
    """Flips both ways, McNemar's exact p of 5 against 1 (2 x 7 / 64), and the change of the loss."""
    before = [{"loss": 1.0, "correct": i < 6, "coverage": 0.5} for i in range(10)]
    after = [{"loss": 1.0 + i / 10, "correct": i in (0, 6), "coverage": 0.25} for i in range(10)]
    found = paired(before, after)
    assert (found["lost"], found["won"], found["flips"]) == (5, 1, 0.6)
    assert found["mcnemar_p"] == pytest.approx(2 * 7 / 64)
    assert mcnemar(0, 0) == 1
    assert found["loss_change"] == pytest.approx(0.45)
    assert found["loss_change_se"] == pytest.approx(torch.arange(10).double().div(10).std() / math.sqrt(10))
    assert found["coverage_change"] == pytest.approx(-0.25)


# What each look-alike's right answer is, by another way than the one it was made by.
@pytest.mark.parametrize("name", sorted(LOOKALIKES))
def test_lookalikes_are_legal_and_seeded(name: str) -> None:
    rows = LOOKALIKES[name](40, 1)
    found = questions(rows, name, "made")
    assert rows == LOOKALIKES[name](40, 1) != LOOKALIKES[name](40, 2)
    assert len({row.prompt for row in found.rows}) > 20
    if found.kind == "classification" and name != "modus-tollens":  # there the answer is always yes
        assert {row.right for row in found.rows} == {0, 1}


def test_equations_of_a_lookalike_hold() -> None:
    """The answer asked for solves its equation, and the usual one doesn't."""
    for row in questions(LOOKALIKES["repetitive-algebra"](50, 0), "a", "made").rows:
        left, right = row.prompt.rsplit("question: ", 1)[1].split(". x")[0].split(" = ")
        factor, more = left.split("x + ")
        answers = [int(text) for text in row.answers]
        assert [int(factor) * x + int(more) == int(right) for x in answers] == [i == row.right for i in range(2)]


def test_bets_of_a_lookalike_are_worth_it() -> None:
    """The right answer is the expected value's sign, and the outcome shown says the contrary."""
    for row in questions(LOOKALIKES["hindsight-neglect"](50, 0), "h", "made").rows:
        last = row.prompt.rsplit("Question:", 1)[1]
        lose, cost, win, gain = map(int, re.findall(r"\b(\d+) percent chance of \w+ \$(\d+)", last)[0] + (
            re.findall(r"\b(\d+) percent chance of earning \$(\d+)", last)[0]))  # fmt: skip
        assert (win * gain > lose * cost) == (row.answers[row.right] == " Y") == ("losing $" in last.split("up ")[1])


def test_tasks_by_name(tmp_path: Path) -> None:
    """Eleven; the prize's file goes before a look-alike, under any of its names; the rest says what to do."""
    assert len(TASKS) == 11
    assert len(made_here()) == 8
    assert find_questions("NeQA", rows=3).source.startswith("look-alike")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quote_repetition.jsonl").write_text(json.dumps(CLASSES))
    assert find_questions("resisting-correction", tmp_path).source.endswith("quote_repetition.jsonl")
    with pytest.raises(UsageError, match=r"memo-trap.*--task-dir"):
        find_questions("memo-trap", tmp_path)
    with pytest.raises(UsageError, match="Did you mean"):
        find_questions("neqaa")
