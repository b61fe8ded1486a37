"""How fast a packed model runs here, beside itself with its weights unpacked in bfloat16 and in float32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.core.device import check_device
from nybble.core.dtypes import float_dtype
from nybble.core.errors import ModelError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.versions import versions
from nybble.nn.decoding import Decoding, decoding_of
from nybble.nn.kv_model import cache_argument
from nybble.nn.layer import QuantLayer
from nybble.nn.swap import hold_dense
from nybble.pipelines.kernels import kernels_of_model
from nybble.pipelines.load import load_with_origin

Turn = dict[str, dict[str, float]]
"""What was timed -> model -> tokens a second."""
BEHIND = 32
"""Tokens that are in the cache when writing begins."""


@explicit_settings()
def bench(
    model: str | Path,
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    tokens: int = 8,
    rounds: int = 3,
    against: Sequence[str] = ("bfloat16", "float32"),
    device: str = "cpu",
) -> dict[str, Any]:
    """Read a prompt and write some tokens, in turns with the unpacked model.

    Args:
        model: a folder or file with packed weights, as for :func:`nybble.pipelines.load.load`.
        batches: sequences that are written at once.
        prompt: tokens that are read at once.
        tokens: steps that are timed in each turn.
        rounds: turns; each figure is the median over them, each ratio the median of the ratios within a turn.
        against: dtypes of the unpacked models. They round no activations.
        device: cpu or cuda.

    Returns:
        ``rows``: for the packed model and each unpacked one ``name``, ``bytes`` of all tensors, ``read`` in tokens a
        second, ``write``: batch -> tokens a second; ``one_call``: whether the packed model writes a token in one call
        (:mod:`nybble.nn.decoding`), or module by module as the unpacked ones do; ``ratios`` of the packed model's
        rates to the fastest unpacked model's in the same turn; ``kernels`` as
        :func:`nybble.pipelines.kernels.kernels_of`; ``threads``, ``versions``.

    Raises:
        ModelError: no language model; or nothing of it is packed.
        UsageError: a number below 1, or a dtype that isn't one of floats.
    """
    for name, value in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds), *(("batches", b) for b in batches)):
        if value < 1:
            raise UsageError(f"{name} is a whole number from 1 on; got {value!r}.")
    dtypes = [float_dtype(name, "against") for name in against]
    check_device(device)
    packed, _ = load_with_origin(model, device=device, packed=True)
    if not packed.can_generate() or packed.main_input_name != "input_ids":
        raise ModelError(f"{model} is a {type(packed).__name__}; a model that writes text can be timed.")
    kernels = kernels_of_model(packed)
    if not kernels:
        raise ModelError(f"{model} has no packed weights: time what `nybble quantize` makes, or others' such models.")
    most = getattr(packed.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(
        ("prompt", prompt), (f"tokens, behind {BEHIND} of a prompt,", BEHIND + tokens), key=lambda one: one[1]
    )
    if isinstance(most, int) and longest[1] > most:
        raise UsageError(
            f"{longest[0]} is {longest[1]}, and {model} has {most} positions; at most so many can be timed."
        )
    models: dict[str, nn.Module] = {"packed": packed}
    for name, dtype in zip(against, dtypes, strict=True):
        models[name] = unpacked(load_with_origin(model, dtype=dtype, device=device, packed=True)[0])
    work: dict[str, Callable[[nn.Module], float]] = {"read": partial(_reads, prompt)}
    work |= {str(b): partial(_writes, b, tokens) for b in batches}
    for run in work.values():  # the first call of each makes buffers and code
        for timed in models.values():
            run(timed)
    turns = [{what: {name: run(m) for name, m in models.items()} for what, run in work.items()} for _ in range(rounds)]
    return {
        "model": str(model),
        "prompt": prompt,
        "tokens": tokens,
        "rounds": rounds,
        "device": device,
        "threads": torch.get_num_threads(),
        **_summary(turns, {name: held(m) for name, m in models.items()}, list(against)),
        "one_call": decoding_of(packed, 1, 1) is not None,
        "kernels": kernels,
        "versions": versions(),
    }


def _summary(turns: Sequence[Turn], sizes: Mapping[str, int], against: Sequence[str]) -> dict[str, Any]:
    """``rows`` and ``ratios`` of :func:`bench`, from what each turn came to."""
    rows = []
    for name, size in sizes.items():
        rates = {what: statistics.median(turn[what][name] for turn in turns) for what in turns[0]}
        rows.append({"name": name, "bytes": size, "read": rates.pop("read"), "write": rates})
    ratios = {
        what: statistics.median(turn[what]["packed"] / max(turn[what][name] for name in against) for turn in turns)
        for what in (turns[0] if against else ())
    }
    return {"rows": rows, "ratios": ratios}


def unpacked(model: Any) -> nn.Module:
    """The model with dense copies of its weights, and inputs as they come."""
    hold_dense(model, model.dtype)
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            layer.inputs = layer.outputs = None
    found: nn.Module = model
    return found


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each once; dense copies of packed weights instead of these."""
    dense = {
        id(module): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
    }
    covered = {tensor.data_ptr() for module in model.modules() if id(module) in dense for tensor in module.buffers()}
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.data_ptr() not in covered}
    return sum((tensors | {t.data_ptr(): t.nbytes for t in dense.values()}).values())


@torch.no_grad()
def read(model: Any, tokens: int) -> float:
    """Seconds for so many tokens at once."""
    ids = _ids(model, 1, tokens)
    _wait(model)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    _wait(model)
    return time.perf_counter() - start


@torch.no_grad()
def write(model: Any, batch: int, tokens: int) -> float:
    """Seconds for so many steps of a batch, behind a short prompt in the cache; in one call each where that can be."""
    decoding = decoding_of(model, batch, BEHIND + tokens)
    if decoding is not None:
        return _write_steps(model, decoding, batch, tokens)
    cache = cache_argument(type(model))  # transformers 5.24 has another name for it
    past = getattr(model(input_ids=_ids(model, batch, BEHIND), use_cache=True), cache)
    token = _ids(model, batch, 1)
    _wait(model)
    start = time.perf_counter()
    for _ in range(tokens):
        found = model(input_ids=token, use_cache=True, **{cache: past})
        past, token = getattr(found, cache), found.logits[:, -1:].argmax(-1)
    _wait(model)
    return time.perf_counter() - start


def _write_steps(model: Any, decoding: Decoding, batch: int, tokens: int) -> float:
    decoding.read(_ids(model, batch, BEHIND))
    token = _ids(model, batch, 1)[:, 0]
    start = time.perf_counter()
    for _ in range(tokens):
        token = decoding.step(token).argmax(-1)
    return time.perf_counter() - start


def _reads(tokens: int, model: nn.Module) -> float:
    """Tokens a second."""
    return tokens / read(model, tokens)


def _writes(batch: int, tokens: int, model: nn.Module) -> float:
    """Tokens a second."""
    return batch * tokens / write(model, batch, tokens)


def _ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Some tokens, the same ones each time."""
    most = model.config.get_text_config().vocab_size
    ids: torch.Tensor = (torch.arange(batch * tokens, device=model.device) * 7919 % most).view(batch, tokens)
    return ids


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
