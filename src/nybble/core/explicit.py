"""What a caller's own torch settings must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

CPU = torch.device("cpu")


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products inside keep their operands' dtypes, on any device that has autocast at all.

    Nothing is entered where nothing is to be left: within one autocast another keeps its copies of weights beyond its
    end, and a training loop inside would multiply with the weights of its first update.
    """
    known = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@contextmanager
def explicit_settings() -> Iterator[None]:
    """Run under torch's own defaults: float32, the CPU, no autocast, no inference mode; the caller's come back.

    Library code names its dtypes; that of models, of other packages, doesn't always.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            stack.enter_context(no_autocast(torch.device(kind)))
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        yield
