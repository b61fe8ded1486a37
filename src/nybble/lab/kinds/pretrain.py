"""``pretrain``: a small llama is trained from nothing on bytes, its operands rounded: a point of a training law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nybble.core.errors import DataError, UsageError
from nybble.core.options import at_least_one
from nybble.core.seeds import generator
from nybble.data.text import check_source
from nybble.lab.kinds import RunKind
from nybble.lab.laws.trainings import block_of, layout_of

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD = 32
JUDGED = 64
"""Windows of held-out text."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(RunKind):
    """AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1, a cosine to a tenth behind 5 % of warm-up.

    Attributes:
        width, layers: of the llama; heads are 32 wide, its MLP 8/3 of the width. tokens: that it sees, bytes of text.
        format: ``bf16`` (nothing is rounded) or a layout, E2M1. block: elements that share a scale, or ``channel``.
        operands: which are rounded, of P1 to P6 (:mod:`nybble.lab.six_products`), commas between.
        data: text; the last tenth of it is held out, or judged_on. batch: windows a step. seq_len: bytes of one.
        lr: the most. dtype: of the products. device: cpu or cuda. seed: of weights and of the windows' order.
    """

    FILES: ClassVar[tuple[str, ...]] = ("data", "judged_on")

    width: int
    layers: int
    tokens: int
    format: str = "bf16"
    block: int | str = 32
    operands: str = "P2,P4,P6"
    data: str = "builtin"
    judged_on: str | None = None
    batch: int = 16
    seq_len: int = 128
    lr: float = 3e-3
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Sizes, and the format with its block."""
        at_least_one(width=self.width, layers=self.layers, tokens=self.tokens, batch=self.batch, seq_len=self.seq_len)
        if self.width % HEAD:
            raise UsageError(f"width is a multiple of {HEAD}; got {self.width}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"dtype is float32 or bfloat16; got {self.dtype!r}.")
        for src in (self.data, self.judged_on):
            if src is not None:
                check_source(src)
        self._six()

    def run(self, folder: Path) -> Mapping[str, Any]:
        """``loss`` in nats a byte on held-out text; ``N``, ``D``, ``B`` and ``train_loss``, as a law reads them."""
        import torch

        text, held = _bytes(self.data, self.judged_on)
        if min(len(text), len(held)) <= self.seq_len + 1:
            raise DataError(f"{self.data}: too little text for windows of {self.seq_len} bytes.")
        model, weights = self._model()
        steps = max(1, self.tokens // (self.batch * self.seq_len))
        last = self._train(model, text.to(self.device), steps)
        model.eval()
        starts = torch.linspace(0, len(held) - self.seq_len - 1, JUDGED).long()
        with torch.no_grad():
            loss = math.fsum(_loss(model, _windows(held.to(self.device), part, self.seq_len)).item() * len(part)
                             for part in torch.split(starts, self.batch)) / JUDGED  # fmt: skip
        return {
            "loss": loss, "train_loss": last, "N": weights, "D": steps * self.batch * self.seq_len,
            "B": str(self.block), "steps": steps,
        }  # fmt: skip

    def _six(self) -> tuple[Any, ...]:
        from nybble.lab.six_products import OPERANDS, quantizer_of

        asked = {name.strip() for name in self.operands.split(",") if name.strip()}
        if odd := sorted(asked - set(OPERANDS)):
            raise UsageError(f"operands are {', '.join(OPERANDS)}; got {', '.join(odd)}.")
        layout = layout_of(self.format)
        quantizer = None if layout is None else quantizer_of(*layout, block_of(self.block))
        return tuple(quantizer if name in asked else None for name in OPERANDS)

    def _model(self) -> tuple[nn.Module, int]:
        """From a seed, and how many weights its linear layers have."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from nybble.core.seeds import preserve_global_rng
        from nybble.lab.six_products import swap

        config = LlamaConfig(
            vocab_size=256, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.width // HEAD, intermediate_size=-(-self.width * 8 // 3 // 32) * 32,
            max_position_embeddings=self.seq_len, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        with preserve_global_rng():
            torch.manual_seed(self.seed)
            model: Any = LlamaForCausalLM(config)
        weights = swap(model.model, self._six(), getattr(torch, self.dtype))
        return model.to(self.device), weights

    def _train(self, model: nn.Module, text: Tensor, steps: int) -> float:
        import torch

        draws = generator(self.seed, "windows")  # the same for all formats
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        model.train()
        for _ in range(steps):
            starts = torch.randint(len(text) - self.seq_len, (self.batch,), generator=draws)
            loss = _loss(model, _windows(text, starts, self.seq_len))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return float(loss.detach())


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    import torch

    return text[(starts[:, None] + torch.arange(length + 1)).to(text.device)].long()


def _loss(model: Any, windows: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=windows[:, :-1]).logits.float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@lru_cache(1)
def _bytes(data: str, judged_on: str | None) -> tuple[Tensor, Tensor]:
    """Text to train and to judge on, [bytes] each, read once for all runs of a worker."""
    import numpy as np
    import torch

    from nybble.data.text import load_text

    def read(src: str) -> Tensor:
        joined = "\n\n".join(load_text(src, "calibration").documents).encode()
        return torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy())

    text = read(data)
    if judged_on is not None:
        return text, read(judged_on)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


PART = Pretrain
