"""A masked language model on the text of ``lm``: 38 of 256 tokens are predicted, most of them masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.optimizer_quality.models import LanguageModel
from benchmarks.optimizer_quality.tasks import Plan, Task
from torch import Tensor, nn

SHARE = 0.15  # of the tokens are predicted: 0.8 of these are masked, 0.1 are others, 0.1 stay (Devlin et al. 2019)


class MaskedLM(Task):
    """The mask is a word of its own behind the vocabulary."""

    title, unit, arrays = "masked language model", "nats a masked token", ("lm.",)
    plan = Plan(
        width=384, layers=6, heads=6, context=256, steps=1200, batch=96,
        rate=1e-3, decay=0.05, betas=(0.9, 0.98), seconds=15,
    )  # fmt: skip

    def load(self, arrays: dict[str, Any]) -> None:  # noqa: D102
        whole = [torch.from_numpy(arrays[name].astype("int32")) for name in ("lm.train", "lm.held")]
        self.rows, self.held = (torch.stack(torch.split(ids, self.p.context)[:-1]).to(self.device) for ids in whole)
        self.words, self.many = self.about["vocabulary"], round(SHARE * self.p.context)

    def model(self) -> nn.Module:  # noqa: D102
        p = self.p
        return LanguageModel(self.words + 1, p.width, p.heads, p.layers, p.context, causal=False)

    def masked(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What the network reads, where it is judged [rows, many], and what stood there."""
        ids = ids.long()
        drawn = torch.rand(ids.shape, generator=generator, device=ids.device)
        places = drawn.topk(self.many, dim=1, sorted=False).indices
        target = ids.gather(1, places)
        kind = torch.rand(places.shape, generator=generator, device=ids.device)
        other = torch.randint(self.words, places.shape, generator=generator, device=ids.device)
        shown = torch.where(kind < 0.8, self.words, torch.where(kind < 0.9, other, target))
        return ids.scatter(1, places, shown), places, target

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: D102
        generator = torch.Generator(self.device).manual_seed(seed)
        for index in self.order(len(self.rows), seed):
            yield self.masked(self.rows[index], generator)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:  # noqa: D102
        ids, places, target = batch
        assert isinstance(model, LanguageModel)
        hidden = model(ids)
        chosen = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return F.cross_entropy(model.logits(chosen).flatten(0, 1), target.flatten())

    def held_out(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        generator = torch.Generator(self.device).manual_seed(1 << 20)
        rows = self.held[: self.p.judged]
        parts = [self.masked(part, generator) for part in torch.split(rows, self.p.batch)]
        losses = [self.loss(model, *part) * len(part[0]) for part in parts]
        return {"loss": float(torch.stack(losses).sum()) / len(rows)}


TASK = MaskedLM
