"""What a quantization run can be told beside model, recipe and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.core.device import check_device
from nybble.core.dtypes import float_dtype
from nybble.core.errors import UsageError
from nybble.core.options import at_least_one, check_types, settings_of
from nybble.data import Wanted

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from torch import nn

    Device: TypeAlias = torch.device | str
    Dtype: TypeAlias = torch.dtype | str
else:
    Device = Dtype = Any  # told by their names, so that torch, which takes seconds, needn't be there

DEFAULT_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run can be told beside model, recipe and data.

    Attributes:
        samples: calibration sequences; None takes 128, or as many as the data has. seq_len: their length.
        batch: sequences a forward takes.
        seed: of every random choice.
        device: ``cpu`` or ``cuda``, kept as a name; None takes the CPU, or where a model in memory is.
        dtype: of forwards and of what stays unquantized: float32, bfloat16 or float16, by name or torch's, kept as
            torch's; None takes bfloat16, or a model in memory's own.
        products: what products of a 16-bit ``dtype`` are computed in on a CPU: it itself, or float32; None measures
            which is faster (:mod:`nybble.core.products`). Results differ in the last bits.
        resume: continue a killed run. spill: keep hidden states in a file instead of memory.
    """

    samples: int | None = None
    seq_len: int = 512
    batch: int = 8
    seed: int = 0
    device: Device | None = None
    dtype: Dtype | None = None
    products: Dtype | None = None
    resume: bool = False
    spill: bool = False

    def __post_init__(self) -> None:
        check_types(self, "settings")
        at_least_one(samples=self.samples, seq_len=self.seq_len, batch=self.batch)
        if self.device is not None:
            object.__setattr__(self, "device", check_device(self.device))
        for name in ("dtype", "products"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float_dtype(getattr(self, name), name))

    @staticmethod
    def of(given: Settings | Mapping[str, Any] | None) -> Settings:
        """Settings as they are, from a mapping of their fields, or the defaults.

        Raises:
            UsageError: something else. SchemeError: an unknown field, with the closest one, or a wrong type.
        """
        return settings_of(Settings, given, "nybble.Settings")

    def wanted(self) -> Wanted:
        """The calibration samples that are asked of a source."""
        return Wanted(
            part="calibration",
            samples=self.samples or DEFAULT_SAMPLES,
            seq_len=self.seq_len,
            seed=self.seed,
            fewer=self.samples is None,
        )

    def place(self, model: nn.Module | None) -> tuple[torch.device, torch.dtype]:
        """Where blocks run, and in which dtype: as asked, or the CPU and bfloat16; of a model in memory, its own.

        Raises:
            UsageError: a model in memory is somewhere else, or of another dtype, than was asked for.
        """
        import torch

        if model is None:
            return torch.device(self.device or "cpu"), float_dtype(self.dtype or torch.bfloat16, "dtype")
        first = next(iter(model.parameters()))
        same_device = self.device is None or self.device in (str(first.device), first.device.type)
        if not same_device or self.dtype not in (None, first.dtype):
            wanted = self.dtype if same_device else self.device
            raise UsageError(
                f"a model in memory is quantized as it is, {first.dtype} on {first.device}; the settings ask for "
                f"{wanted}. Move or cast it first, or leave that out."
            )
        return first.device, first.dtype

    def products_of(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """What products of tensors of ``dtype`` are computed in: as asked, or what is measured to be faster.

        Raises:
            UsageError: asked for another 16-bit dtype than that of the tensors.
        """
        import torch

        from nybble.core.products import product_dtype

        if self.products not in (None, torch.float32, dtype):
            raise UsageError(f"products in {self.products} of tensors in {dtype}; give one of the two another dtype.")
        if device.type != "cpu" or dtype == torch.float32:
            return dtype
        return product_dtype(device, dtype) if self.products is None else float_dtype(self.products, "products")
