"""A quantized model whose calls are done in integers for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.nn.integer.blocks import Blocks
from nybble.nn.integer.convert import integer_network
from nybble.nn.integer.dyadic import Ties
from nybble.nn.integer.network import IntegerNetwork
from nybble.nn.integer.transformer import in_blocks, of_blocks


@contextmanager
def in_integers(model: nn.Module, ties: Ties = "half-up") -> Iterator[None]:
    """Calls of ``model`` inside are done in integers; what they give is in float again.

    A transformer in blocks (recipe ``bct``) goes through its own forward (:mod:`nybble.nn.integer.transformer`). Of any
    other, an :class:`IntegerNetwork` is made at the first image of each size; it runs on the CPU, where torch has
    integer convolutions, and gives logits where the image is. The model, its packed weights and what is saved of it
    stay as they are: both are functions of them.

    Args:
        model: a transformer, or as of :func:`nybble.nn.integer.convert.integer_network`, called with one tensor.
        ties: of requantizations; in blocks they are ``half-up``.

    Raises:
        NybbleError: as of that function at the first call, or of
            :func:`nybble.nn.integer.transformer.of_blocks` at once.
    """
    if in_blocks(model):
        with of_blocks(model), _in_floats(model):
            yield
        return
    with _classified(model, ties):
        yield


@contextmanager
def _in_floats(model: nn.Module) -> Iterator[None]:
    """What a model in blocks gives, as floats."""
    forward = model.forward

    @torch.no_grad()
    def converted(*args: Any, **named: Any) -> Any:
        found = forward(*args, **named)
        for name, value in found.items():
            if isinstance(value, Blocks):
                found[name] = value.float()
        return found

    vars(model)["forward"] = converted
    try:
        yield
    finally:
        del vars(model)["forward"]


@contextmanager
def _classified(model: nn.Module, ties: Ties) -> Iterator[None]:
    networks: dict[tuple[int, ...], IntegerNetwork] = {}

    @torch.no_grad()
    def forward(x: Tensor | None = None, /, **named: Any) -> Any:
        given = [value for value in (x, *named.values()) if isinstance(value, Tensor)]
        if len(given) != 1:
            raise ModelError(f"an integer {type(model).__name__} is called with one tensor, its images.")
        image = given[0]
        size = tuple(image.shape[1:])
        if size not in networks:
            with _as_it_is(model):
                networks[size] = integer_network(model, image[:1].repeat(2, *[1] * len(size)), ties)
            networks[size].cpu()
        return _Logits(logits=networks[size](image.cpu()).to(image.device))

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    forward = vars(model).pop("forward")
    try:
        yield
    finally:
        vars(model)["forward"] = forward


class _Logits(dict[str, Tensor]):
    """As models of transformers answer: by key or attribute."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]
