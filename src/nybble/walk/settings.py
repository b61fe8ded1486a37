"""What a quantization run can be told beside model, recipe and data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.core.device import check_device
from nybble.core.errors import UsageError

DEFAULT_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run can be told beside model, recipe and data.

    Attributes:
        samples: calibration sequences; None takes 128, or as many as the data has. seq_len: their length.
        batch: sequences a forward takes.
        seed: of every random choice. device: ``cpu`` or ``cuda``. dtype: of forwards and of what stays unquantized.
        resume: continue a killed run. spill: keep hidden states in a file instead of memory.
    """

    samples: int | None = None
    seq_len: int = 512
    batch: int = 8
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    resume: bool = False
    spill: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "seq_len", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more.")
        check_device(self.device)
