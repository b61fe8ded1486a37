"""Speech recognizers that spell by CTC, on folders of sounds with transcripts (:mod:`nybble.data.audio`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError
from nybble.core.progress import Progress, task
from nybble.data.audio import recordings
from nybble.data.pairs import IGNORED
from nybble.data.samples import Origin
from nybble.data.speech import ears_of, hear, stacked
from nybble.data.text import Part
from nybble.data.transcripts import error_rates, frames_of, normalised, understood
from nybble.models.adapter import reads_of
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN
from nybble.training.tasks import Row, Task


@dataclass(frozen=True, kw_only=True)
class Utterances:
    """What a source came to.

    Attributes:
        rows: the model's inputs without a dimension of utterances; ``labels``, ids of characters; ``text``; ``at``.
        source: the SRC. sha256: of all features and texts. seconds: of sound.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    sha256: str
    seconds: float

    @property
    def targets(self) -> int:
        """Characters."""
        return sum(len(row["labels"]) for row in self.rows)

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these examples."""
        found = {"source": self.source, "sha256": self.sha256, "examples": len(self.rows), "targets": self.targets}
        return {**found, "seconds": round(self.seconds, 2)}


class Recognition(Task):
    """See the module.

    Metrics: ``wer`` and ``cer``, error rates of words and characters over a whole held-out set.
    """

    summary: ClassVar[str] = "speech recognizers that spell by CTC, on folders of sounds with transcripts"
    unit: ClassVar[str] = "characters"
    shown: ClassVar[str] = "wer"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        own = getattr(getattr(model, "config", None), "model_type", "") == "nybble-recognizer"
        return own or (type(model).__name__.endswith("ForCTC") and reads_of(model) == "speech")

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:
        """Nothing: utterances are as long as they are."""

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Utterances:  # noqa: D102
        found, (ears, rate) = recordings(src), ears_of(origin)
        silent = next((each.path for each in found if not each.text), None)
        if silent is not None:
            raise DataError(f"data {src!r}: nothing says what is said in {silent}. Give a transcript, or take it away.")
        heard, seconds = hear(found, ears, rate)
        digest, spells, rows = hashlib.sha256(), speaker(origin), list[dict[str, Any]]()
        for at, (each, inputs) in enumerate(zip(found, heard, strict=True)):
            digest.update(next(iter(inputs.values())).numpy().astype("<f4").tobytes() + str(each.text).encode())
            rows.append({**inputs, "labels": torch.tensor(spells(each.text or "")), "text": each.text, "at": at})
            _require_room(model, rows[-1], str(each.path))
        return Utterances(rows=tuple(rows), source=src, sha256=digest.hexdigest(), seconds=seconds)

    def length(self, row: Row) -> int:  # noqa: D102
        return len(_inputs(row)[0])

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        names = [name for name in rows[0] if name.startswith("input_") or name == "attention_mask"]
        found = stacked([{name: row[name] for name in names} for row in rows])
        labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], True, IGNORED)
        return {**found, "labels": labels}

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        told: list[str] = []
        with evaluation_mode(model), task(progress, -(-len(rows) // batch), "held-out utterances"):
            for start in range(0, len(rows), batch):
                told += self._told(model, origin, rows[start : start + batch])
                progress.advance()
        return error_rates([row["text"] for row in rows], told)

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        shown = rows[:SHOWN]
        with evaluation_mode(model):
            told = self._told(model, origin, shown)
        return [
            {"prompt": f"utterance {row['at']}", "text": text, "target": str(row["text"])}
            for row, text in zip(shown, told, strict=True)
        ]

    def _told(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[str]:
        return understood(model, origin, {n: t for n, t in self.collate(rows).items() if n != "labels"})


def speaker(origin: Origin) -> Callable[[str], list[int]]:
    """From text to ids: of the characters that a config holds, those that it has; or the tokenizer's."""
    characters = getattr(origin.config, "vocabulary", None)
    if isinstance(characters, str):
        return lambda text: [characters.index(c) for c in normalised(text) if c in characters]
    tokenizer: Any = origin.tokenizer()
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _inputs(row: Row) -> tuple[Tensor, ...]:
    return tuple(row[name] for name in ("input_features", "input_values") if name in row)


def _require_room(model: nn.Module, row: Row, name: str) -> None:
    """Refuse an utterance with more characters than CTC has frames for: one each, and a blank between equal ones."""
    labels = row["labels"]
    main = _inputs(row)[0]
    mask = row.get("attention_mask", torch.ones(len(main), dtype=torch.int64))
    frames = frames_of(model, {"input": main[None], "attention_mask": mask[None]}, len(main))[0]
    needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
    if not len(labels) or needed > frames:
        raise DataError(
            f"{name}: {len(labels)} characters of its transcript are in the model's vocabulary, and the model gives "
            f"{frames} frames to spell them; CTC needs at least one of them, and a frame for each. Take it away."
        )


PART = Recognition()
