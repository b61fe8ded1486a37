"""What a training run can be told beside method, model and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nybble.core.device import check_device
from nybble.core.dtypes import float_dtype
from nybble.core.errors import UsageError
from nybble.core.options import at_least_one, check_types


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Sizes, rates, device, seed; the defaults are Guanaco's (Dettmers et al. 2023, arXiv:2305.14314, appendix B).

    Attributes:
        steps: updates; None: as many as ``epochs`` take. epochs: passes over the data.
        batch: examples a forward takes. accumulate: forwards an update takes.
        seq_len: most tokens of an example. lr: learning rate behind the warm-up; 1e-4 from 33B parameters on.
        warmup: share of the updates in which the rate grows from 0 to ``lr``. schedule: from there on it is
            ``constant``, or falls to 0 as a line (``linear``) or half a ``cosine``.
        clip: largest norm of all gradients together.
        optimizer: a name from :mod:`nybble.optim` or ``torch.optim``, perhaps with options: ``AdamW8bit min_size=0``.
        checkpointing: compute a block's activations again in backward, instead of keeping them; networks that
            can't (convolutional ones) keep them.
        compile: blocks run through torch.compile, one by one; the first step waits for the compiler, and sums may
            differ in their last bits.
        augment: of images: ``flip``, ``crop=PIXELS``, or both; drawn anew for each forward.
        save_every: updates from one checkpoint to the next.
        dtype: of forwards: bfloat16 or float32 (float16 overflows in one of five runs, says the authors' code).
        device: ``cpu`` or ``cuda``. seed: of every random choice. resume: continue a run that was killed.
    """

    steps: int | None = None
    epochs: int = 1
    batch: int = 1
    accumulate: int = 16
    seq_len: int = 512
    lr: float = 2e-4
    warmup: float = 0.03
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip: float = 0.3
    optimizer: str = "AdamW state=none"
    checkpointing: bool = True
    compile: bool = False
    augment: str = ""
    save_every: int = 100
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        check_types(self, "settings")
        sizes = {"steps": self.steps, "epochs": self.epochs, "batch": self.batch, "accumulate": self.accumulate}
        at_least_one(**sizes, save_every=self.save_every)
        if self.seq_len < 2:
            raise UsageError(f"seq_len is {self.seq_len}, which leaves no token to predict; it must be 2 or more.")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup is {self.warmup}; it must be a share from 0 to 1.")
        if str(float_dtype(self.dtype, "dtype")) == "torch.float16":
            raise UsageError("dtype is float16, in which gradients overflow; train in bfloat16 or float32.")
        if check_device(self.device) not in ("cpu", "cuda"):
            raise UsageError(f"device is {self.device}; say cuda, and choose the device by CUDA_VISIBLE_DEVICES.")

    def request(self) -> dict[str, Any]:
        """What decides the result."""
        return {key: value for key, value in asdict(self).items() if key not in ("resume", "save_every")}
