"""Blocks of a network through torch.compile, one by one.

What is compiled for one block serves all that are alike: it takes as long as one block takes, not as a whole network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nybble.core.errors import UsageError

BACKEND: Any = "inductor"
"""torch.compile's own."""


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Within, blocks run compiled; nothing else of the model changes, and none of its names.

    Shapes are symbols from the first call on: were they only after a second length had come, a run that is gone on with
    would be compiled otherwise than the one that was killed.

    Raises:
        UsageError: there are no blocks that transformers could also compute again.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(f"compile: {type(model).__name__} has no blocks that transformers knows; leave it out.")
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
