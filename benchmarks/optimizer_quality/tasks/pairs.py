"""Contrastive learning: a package's summary finds its description among those of a batch, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.optimizer_quality.models import TextEncoder
from benchmarks.optimizer_quality.pack import DESCRIPTION, SUMMARY, padded
from benchmarks.optimizer_quality.tasks import Plan, Task
from torch import Tensor, nn

OUT = 128  # dimensions of the space that both texts come to
START = 2.659  # log of 1 / 0.07, the inverse temperature (Radford et al. 2021, arXiv:2103.00020)
HIGHEST = 4.605  # log of 100, where it is held
JUDGED = 256  # texts of a held-out batch


class TwoTexts(nn.Module):
    """One encoder for both texts, and a temperature that is learned."""

    def __init__(self, *encoder: Any) -> None:
        super().__init__()
        self.encoder = TextEncoder(*encoder)
        self.scale = nn.Parameter(torch.tensor(START))

    def forward(self, short: Tensor, long: Tensor) -> Tensor:
        """Cosines over the temperature, [batch, batch]."""
        a, b = (F.normalize(self.encoder(ids).float(), dim=-1) for ids in (short, long))
        with torch.autocast(a.device.type, enabled=False):  # cosines times up to 100 need more than 8 bits
            return self.scale.clamp(max=HIGHEST).exp() * (a @ b.T)


class Pairs(Task):
    """One package of each source, so that no two descriptions of a batch say the same."""

    title, unit, arrays = "contrastive pairs", "nats a text", ("packages.",)
    plan = Plan(
        width=256, layers=4, heads=4, context=DESCRIPTION, steps=800, batch=512,
        rate=1e-3, decay=0.05, betas=(0.9, 0.999), dropout=0.1, seconds=18,
    )  # fmt: skip

    def load(self, arrays: dict[str, Any]) -> None:  # noqa: D102
        held, one = (torch.from_numpy(arrays[f"packages.{name}"]) for name in ("held", "one"))
        texts = [
            torch.from_numpy(padded(arrays, f"packages.{name}", width)).to(torch.int32)
            for name, width in (("summary", SUMMARY), ("description", DESCRIPTION))
        ]
        self.train = [ids[one & ~held].to(self.device) for ids in texts]
        whole = int((one & held).sum()) // JUDGED * JUDGED
        self.held = [ids[one & held][: min(whole, max(self.p.judged, JUDGED))].to(self.device) for ids in texts]

    def model(self) -> nn.Module:  # noqa: D102
        p = self.p
        return TwoTexts(self.about["vocabulary"], p.width, p.heads, p.layers, DESCRIPTION, OUT, p.dropout)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: D102
        for index in self.order(len(self.train[0]), seed):
            yield tuple(ids[index].long() for ids in self.train)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:  # noqa: D102
        cosines = model(*batch)
        same = torch.arange(len(cosines), device=cosines.device)
        return (F.cross_entropy(cosines, same) + F.cross_entropy(cosines.T, same)) / 2

    def held_out(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        parts = zip(*(ids.long().split(JUDGED) for ids in self.held), strict=True)
        return {"loss": float(torch.stack([self.loss(model, *part) for part in parts]).mean())}


TASK = Pairs
