"""Whether a model only hands on from block to block what its blocks give: then it can be walked."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nybble.calibration.trace import HIDDEN, ChainError, capture_block_calls
from nybble.models.adapter import Adapter


def chain_fault(model: nn.Module, adapter: Adapter, inputs: Mapping[str, Tensor]) -> ChainError | None:
    """Why a model can't be walked from block to block, found before any of its weights is read; None where it can.

    What is outside the blocks gets made-up weights where it is on the meta device.

    Args:
        model: in eval mode; not changed.
        adapter: the model's, not ``whole``.
        inputs: one sample.
    """
    model = _with_made_up_outside(model, adapter)
    tensors = (*model.parameters(), *model.buffers())
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    try:
        calls = capture_block_calls(model, given, adapter=adapter, strict=True)
        if adapter.decoder_blocks is not None and calls[0].start is not None:
            capture_block_calls(model, given, adapter=adapter, end=calls[0].start[HIDDEN], strict=True)
    except ChainError as fault:
        return fault
    except Exception:  # where the model itself fails, its first real run says so
        return None
    return None


def _with_made_up_outside(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A twin whose tensors outside the blocks are no longer on the meta device; the model itself where none is."""
    names = [name for name in adapter.outside(model) if model.state_dict()[name].is_meta]
    if not names:
        return model
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    empty = twin.state_dict()

    def made_up(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype)
        row = torch.randn(like.shape[-1:], generator=generator, dtype=torch.float32)
        return row.to(like.dtype).expand(like.shape)  # no memory for a table

    twin.load_state_dict({name: made_up(empty[name]) for name in names}, strict=False, assign=True)
    return twin
