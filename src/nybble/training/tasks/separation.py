"""Networks that separate two voices, on mixtures that are drawn (:mod:`nybble.data.voices`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.core.progress import Progress, task
from nybble.data.samples import Origin
from nybble.data.text import Part
from nybble.data.voices import Voices, collate, load_voices
from nybble.nn.in_place import evaluation_mode
from nybble.training.measures import SHOWN
from nybble.training.tasks import Row, Task

TYPE = "nybble-separator"


class Separation(Task):
    """See the module.

    Metrics: ``loss``, minus the SI-SDR in dB; ``si_sdr``, of the voices in the order that fits best; ``si_sdri``, how
    much more that is than the mixture's own.
    """

    summary: ClassVar[str] = "networks that separate two voices, on drawn mixtures"
    unit: ClassVar[str] = "mixtures"
    shown: ClassVar[str] = "si_sdr"

    def claims(self, model: nn.Module) -> bool:  # noqa: D102
        return getattr(getattr(model, "config", None), "model_type", "") == TYPE

    def check(self, model: nn.Module, name: str, seq_len: int) -> None:  # noqa: D102
        asked: Any = model
        if asked.config.voices != 2:
            raise ModelError(f"{name} separates {asked.config.voices} voices, and mixtures are drawn of two.")

    def load(self, src: str, origin: Origin, model: nn.Module, seq_len: int, part: Part) -> Voices:  # noqa: D102
        return load_voices(src, part, rate=int(origin.config.rate))

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # noqa: D102
        return collate(rows)

    def measure(  # noqa: D102
        self, model: nn.Module, origin: Origin, rows: Sequence[Row], batch: int, progress: Progress
    ) -> dict[str, float]:
        with task(progress, -(-len(rows) // batch), "held-out mixtures"):
            parts = []
            for start in range(0, len(rows), batch):
                parts.append(_ratios(model, rows[start : start + batch]))
                progress.advance()
        after, before = torch.cat(parts).double().mean(0).tolist()
        return {"loss": -after, "si_sdr": after, "si_sdri": after - before}

    def samples(self, model: nn.Module, origin: Origin, rows: Sequence[Row]) -> list[dict[str, str]]:  # noqa: D102
        shown = rows[:SHOWN]
        return [
            {"prompt": f"mixture {row['at']}, {before:.1f} dB", "text": f"{after:.1f} dB", "target": "the voices apart"}
            for row, (after, before) in zip(shown, _ratios(model, shown).tolist(), strict=True)
        ]


@torch.no_grad()
def _ratios(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """SI-SDR of what the model makes of mixtures, and of the mixtures themselves: float32 [rows, 2]."""
    from nybble.models.own.separator import best_si_sdr

    first = next(p for p in model.parameters() if p.is_floating_point())
    given = collate(rows)
    with evaluation_mode(model):
        found = model(input_values=given["input_values"].to(first.device, first.dtype)).logits.float().cpu()
    same = given["input_values"][:, None].expand_as(given["labels"])
    return torch.stack([best_si_sdr(each, given["labels"]) for each in (found, same)], -1)


PART = Separation()
