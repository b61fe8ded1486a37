"""Records to training examples of a causal language model, with a loss on the targets alone.

A record is a chat (``messages``: what the assistant says is the target), a pair (``instruction``, perhaps with
``input``, and ``output``; or ``prompt`` and ``completion``), or ``text``, which is all target. Source and target are
tokenized apart, as whoever asks the model later has the source alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.encoded import Encoded, digest, mask_of, padded
from nybble.data.pairs import IGNORED
from nybble.data.records import parsed, records, string
from nybble.data.rows import render, row_record
from nybble.data.text import Part, load_text
from nybble.data.tokens import starts_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"))
"""Names of source and target in a pair."""
Piece = tuple[str, bool]
"""A part of an example, and whether it is a target."""
Example = dict[str, list[int]]
"""``input_ids`` and, as many, ``labels``: the same ids where the loss looks, ``IGNORED`` elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Examples(Encoded):
    """Rows are :data:`Example`, none longer than asked for and each with a target.

    Attributes:
        left_out: how many had a source so long that no target was left.
    """

    rows: tuple[Example, ...]
    left_out: int

    @property
    def targets(self) -> int:
        """Tokens that the loss looks at; the first of an example is predicted from nothing, so it doesn't count."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    def manifest(self) -> dict[str, Any]:
        """As of all, and ``left_out``."""
        return {**super().manifest(), "left_out": self.left_out}


def load_examples(
    src: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, part: Part = "calibration"
) -> Examples:
    """Read SRC as training examples.

    Args:
        src: records as JSON lines, a JSON list, or a table (CSV, TSV) with a line of these names; or any other text
            that :func:`nybble.data.text.load_text` takes, whose documents are cut into pieces of ``seq_len`` tokens,
            all target.
        tokenizer: of the model; its chat template, if it has one, renders pairs too, as a question and an answer.
        seq_len: most tokens of an example; longer ones lose their end.
        part: which half of ``builtin``.

    Raises:
        UsageError: ``seq_len`` below 2. FileError: SRC can't be read.
        DataError: records that are none of these or have an empty target, by their lines; or no example with a target
            that fits.
    """
    if seq_len < 2:
        raise UsageError(f"a sequence length of {seq_len} leaves no token to predict. Give 2 or more.")
    rows: list[Example] = []
    shortened = left_out = 0
    for pieces in _records(src, tokenizer, part):
        made = _tokenized(pieces, tokenizer)
        if len(pieces) == 1:  # a text: every piece of it serves
            rows += [row for row in _cut(made, seq_len) if len(row["labels"]) > 1]
            continue
        short = {name: ids[:seq_len] for name, ids in made.items()}
        kept = any(label != IGNORED for label in short["labels"][1:])
        shortened += kept and short != made
        left_out += not kept
        rows += [short] if kept else []
    if not rows:
        raise DataError(
            f"data {src!r} holds no example whose target begins within {seq_len} tokens ({left_out} are longer). Allow "
            "longer sequences."
        )
    return Examples(
        rows=tuple(rows), source=src, sha256=digest(rows, "labels"), shortened=shortened, left_out=left_out
    )  # fmt: skip


def collate(rows: list[Example]) -> dict[str, Tensor]:
    """Examples as a batch, padded on the right: ``input_ids``, ``attention_mask``, ``labels``, int64 [rows, longest].

    Padding is token 0, which nothing looks at.
    """
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    return {"input_ids": padded(ids, 0), "attention_mask": mask_of(ids), "labels": padded(labels, IGNORED)}


def prompt_of(row: Example) -> list[int]:
    """The tokens in front of an example's first target; of a text its first half."""
    labels = row["labels"]
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    return row["input_ids"][: first or len(labels) // 2]


def _records(src: str, tokenizer: PreTrainedTokenizerBase, part: Part) -> Iterator[list[Piece]]:
    rows = records(src)
    if rows is not None:
        yield from parsed(src, rows, lambda row, place: _pieces(row, place, tokenizer))
    else:
        yield from ([(text, True)] for text in load_text(src, part, tokenizer).documents)


def _pieces(row: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A record's sources and targets, in turn."""
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return _chat(row["messages"], place, tokenizer)
    pair = next((p for p in PAIRS if isinstance(row, Mapping) and all(key in row for key in p)), None)
    if pair is None:
        if isinstance(row, Mapping) and not {"text", "messages"} & set(row):
            fields = ", ".join(map(str, row)) or "none"
            raise DataError(
                f"{place} has neither 'messages', nor 'instruction' and 'output', nor 'text'; its fields: {fields}."
            )
        text = row_record(row, place, tokenizer).text
        if not text.strip():
            raise DataError(f"{place}: the text is empty, so there is nothing to learn from it. Remove the record.")
        return [(text, True)]
    source, target = (string(row[key], key, place) for key in pair)
    more = string(row.get("input") or "", "input", place)
    _check_target(target, f"{place}: {pair[1]!r}")
    asked = f"{source}\n\n{more}" if more else source
    if tokenizer.chat_template:
        return _chat([{"role": "user", "content": asked}, {"role": "assistant", "content": target}], place, tokenizer)
    return [(f"{asked}\n\n", False), (target + str(tokenizer.eos_token or ""), True)]


def _chat(messages: list[Any], place: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """What the template says before each answer is source, the answer with its end is target."""
    render(messages, place, tokenizer)  # refuses what is malformed
    pieces: list[Piece] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        _check_target(message.get("content"), f"{place}: message {number + 1}, of the assistant,")
        before = render(messages[:number], place, tokenizer, answer=True)
        behind = render(messages[: number + 1], place, tokenizer)
        if not before.startswith(done) or not behind.startswith(before):
            raise DataError(
                f"{place}: the chat template writes message {number + 1} in another way than its beginning, so what is "
                "the target can't be told. Give pairs of 'instruction' and 'output'."
            )
        if behind == before:
            raise DataError(f"{place}: the chat template leaves message {number + 1} out, so there is no target.")
        pieces += [(before.removeprefix(done), False), (behind.removeprefix(before), True)]
        done = behind
    if not pieces:
        raise DataError(f"{place}: no message is of the assistant, so there is no target. Remove the record.")
    return pieces


def _check_target(target: Any, what: str) -> None:
    if not isinstance(target, str) or not target.strip():
        raise DataError(f"{what} is empty, so there is no target. Remove the record, or fill it.")


def _tokenized(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    if not tokenizer.chat_template or len(pieces) == 1:  # a template writes its own
        ids, labels = list(bos := starts_with_bos(tokenizer)), [IGNORED] * len(bos)
    for text, is_target in pieces:
        found = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(pieces) == 1 and tokenizer.eos_token_id is not None:
            found.append(int(tokenizer.eos_token_id))
        ids += found
        labels += found if is_target else [IGNORED] * len(found)
    return {"input_ids": ids, "labels": labels}


def _cut(row: Example, length: int) -> Iterator[Example]:
    for start in range(0, len(row["labels"]), length):
        yield {name: ids[start : start + length] for name, ids in row.items()}
