"""A causal language model of 21M parameters on 50M tokens of English manuals and dictionaries, 21M of them unique."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.optimizer_quality.models import LanguageModel
from benchmarks.optimizer_quality.tasks import Plan, Task
from torch import Tensor, nn


class CausalLM(Task):
    """Windows of 512 tokens; each pass over the text cuts it at another offset."""

    title, unit, arrays = "causal language model", "nats a token", ("lm.",)
    plan = Plan(
        width=512, layers=6, heads=8, context=512, steps=1526, batch=64,
        rate=1.5e-3, decay=0.1, betas=(0.9, 0.95), seconds=40,
    )  # fmt: skip

    def load(self, arrays: dict[str, Any]) -> None:  # noqa: D102
        self.ids = torch.from_numpy(arrays["lm.train"].astype("int32")).to(self.device)
        self.held = torch.from_numpy(arrays["lm.held"].astype("int32")).to(self.device)
        self.window = torch.arange(self.p.context + 1, device=self.device)

    def model(self) -> nn.Module:  # noqa: D102
        p = self.p
        return LanguageModel(self.about["vocabulary"], p.width, p.heads, p.layers, p.context, causal=True)

    def windows(self, ids: Tensor, begin: Tensor) -> Tensor:
        """int64 [windows, context + 1]."""
        return ids[begin[:, None] + self.window].long()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: D102
        count = len(self.ids) // self.p.context - 2  # a window's last target and the offset reach over
        offsets = torch.Generator().manual_seed(seed)
        each = count // self.p.batch
        for step, index in enumerate(self.order(count, seed)):
            if step % each == 0:
                offset = int(torch.randint(self.p.context, (), generator=offsets))
            yield (self.windows(self.ids, offset + self.p.context * index),)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:  # noqa: D102
        (ids,) = batch
        assert isinstance(model, LanguageModel)
        logits = model.logits(model(ids[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def held_out(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        count = min(self.p.judged, (len(self.held) - 1) // self.p.context)
        begin = self.p.context * torch.arange(count, device=self.device)
        parts = begin.split(self.p.batch)
        losses = [self.loss(model, self.windows(self.held, part)) * len(part) for part in parts]
        return {"loss": float(torch.stack(losses).sum()) / count}


TASK = CausalLM
