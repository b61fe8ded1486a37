"""Random numbers that repeat, and that leave the caller's random state alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch


def derive_seed(seed: int, *names: str) -> int:
    """Return a 63-bit seed for one use, from the run's seed and the names that lead to that use.

    Every use has its own stream, so drawing more numbers in one layer changes nothing in the next.

    >>> derive_seed(0, "model.layers.0", "rounding") == derive_seed(0, "model.layers.0", "rounding")
    True
    >>> derive_seed(0, "ab", "c") == derive_seed(0, "a", "bc")
    False
    """
    # JSON keeps ("ab", "c") and ("a", "bc") apart; Python's own hash() changes from run to run.
    digest = hashlib.sha256(json.dumps([int(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *names: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by :func:`derive_seed`.

    Args:
        seed: the run's seed.
        *names: what the numbers are for: layer, step.
        device: where the numbers will be drawn. Devices draw different numbers from one seed: draw on the CPU
            what must not depend on the device.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


@contextmanager
def preserve_global_rng() -> Iterator[None]:
    """Put the global random states of Python, numpy and torch (CPU, and CUDA if in use) back at exit.

    For calls into libraries that draw from, or seed, the global state. CUDA is looked at only if the process
    uses it already: asking would start it.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if in_use else None
    failed = False
    try:
        yield
    except BaseException:
        failed = True
        raise
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            # where a kernel has failed this fails, too, and the first error is the one to see
            with suppress(RuntimeError) if failed else nullcontext():
                torch.cuda.set_rng_state_all(cuda)
