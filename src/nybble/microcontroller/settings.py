"""How a network is to be trained on a microcontroller: what ``config.json`` may say under ``c_train``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nybble.core.errors import UsageError, did_you_mean
from nybble.core.options import at_least_one, check_types
from nybble.microcontroller.arithmetic import TYPES, Arithmetic
from nybble.microcontroller.losses import LOSSES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one export.

    Attributes:
        type: ``float16``, ``bfloat16`` or ``float32``, of everything.
        lanes: of the vector kernels. fused: whether multiply-adds round once. unroll: outputs side by side.
        cores: that rows are split over.
        update: layers that learn, names or patterns; none means all.
        loss: ``cross_entropy``, ``mse``, ``l1`` or ``berhu``. rate: of learning. decay: of weights.
        memory: bytes that all arrays together may have; 0 for no limit.

    Raises:
        UsageError: a value out of range.
    """

    type: str = "float16"
    lanes: int = 2
    fused: bool = False
    unroll: int = 4
    cores: int = 1
    update: tuple[str, ...] = ()
    loss: str = "cross_entropy"
    rate: float = 0.01
    decay: float = 0.0
    memory: int = 0

    def __post_init__(self) -> None:
        check_types(self, "c_train")
        for name, value, known in (("type", self.type, [*TYPES]), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise UsageError(f"c_train: no {name} {value!r}.{did_you_mean(value, known)}")
        at_least_one(unroll=self.unroll, cores=self.cores)
        if self.unroll > 32 or self.cores > 1024:
            raise UsageError(f"c_train: unroll is {self.unroll} and cores {self.cores}; up to 32 and 1024 will do.")
        if not (math.isfinite(self.rate) and math.isfinite(self.decay)) or self.memory < 0:
            raise UsageError(
                f"c_train: rate {self.rate}, decay {self.decay}, memory {self.memory}: not what it can be."
            )
        _ = self.arithmetic(self.lanes)

    @property
    def dtype(self) -> torch.dtype:
        """Of everything."""
        return TYPES[self.type]

    @property
    def trained(self) -> tuple[str, ...] | None:
        """Layers that learn, None for all."""
        return self.update or None

    def arithmetic(self, lanes: int) -> Arithmetic:
        """What the C calculates with, built with that many lanes."""
        return Arithmetic(dtype=self.dtype, lanes=lanes, fused=self.fused)
