"""What a state is kept in: which quantizers can serve it, its codes and back, its form in a state dict."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, SchemeError, UsageError, did_you_mean, within
from nybble.granularity.rank1 import Rank1
from nybble.presets import PRESETS
from nybble.qtensor import from_spec
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.one import One

Kind = Literal["signed", "nonnegative"]
Kept = Tensor | BlockQTensor
"""A state between two steps: float32, or codes and scales."""
StateLine = str | Quantizer | None
StateChoice = StateLine | Mapping[str, StateLine]


@cache
def quantizer(line: str) -> Quantizer:
    """The Quantizer of a canonical line; a step asks for it once a parameter."""
    return Quantizer(line)


# ------------------------------------------------------------------------------------------------------- which one
def resolve(choice: StateChoice, kinds: Mapping[str, Kind], factors: Collection[str] = ()) -> dict[str, str | None]:
    """The canonical quantizer line of each state, or None where it stays float32.

    Args:
        choice: one line for all states, or one for each by name. A preset that comes in a pair (``state8`` and
            ``state8-unsigned``) gives its unsigned half to states that are never negative.
        kinds: what the update rule keeps.
        factors: states so small that one line for all leaves them in float32.

    Raises:
        UsageError: an unknown name or line. SchemeError: a quantizer that can't serve its state, and why.
    """
    if isinstance(choice, Mapping):
        for name in choice:
            if name not in kinds:
                raise UsageError(f"state={dict(choice)}: there is no state {name!r}.{did_you_mean(str(name), kinds)}")
        for name in kinds:
            if name not in choice:
                raise UsageError(f"state={dict(choice)} leaves out {name!r}; None keeps it in float32.")
        lines = dict(choice)
    else:
        lines = {name: None if name in factors else _half(choice, kind) for name, kind in kinds.items()}
    return {name: _canonical(lines[name], name, kind) for name, kind in kinds.items()}


def _half(line: StateLine, kind: Kind) -> StateLine:
    """``state8 flat=64`` as ``state8-unsigned flat=64`` for a state that is never negative."""
    if not isinstance(line, str) or kind == "signed":
        return line
    head, space, rest = line.strip().partition(" ")
    return f"{head}-unsigned{space}{rest}" if f"{head}-unsigned" in PRESETS else line


def _canonical(line: StateLine, name: str, kind: Kind) -> str | None:
    if line is None:
        return None
    if not isinstance(line, str | Quantizer):
        raise UsageError(f"state={line!r}: say a quantizer line such as 'state8', a Quantizer, or None for float32.")
    return _checked(str(line), name, kind)


@cache
def _checked(line: str, name: str, kind: Kind) -> str:
    """The canonical form of a line that can serve a state; every step asks for it."""
    with within(f"state {name!r} in {line!r}"):
        q = Quantizer(line)
        why = _refusal(q, kind)
        if why is not None:
            raise SchemeError(f"{why} Or give each state its own line: state={{{name!r}: ..., ...}}.")
        q.scale.fit(torch.ones(1, 2), q.format, q.rounding)  # a rule that can't take the format says so
    return str(q)


def _refusal(q: Quantizer, kind: Kind) -> str | None:
    """Why ``q`` can't keep such a state, with a way out; None where it can."""
    fmt, inner = q.format, list(_nested(q))
    has_zero = fmt.has_zero
    if q.static:
        return "a static quantizer is calibrated once, and a state changes at every step; leave 'static' out."
    if q.floor or (not has_zero and (isinstance(q.scale, One) or inner)):
        which = (
            f"floor={q.floor} stores no zero" if q.floor else f"{fmt} has no zero, and no plain scale that could be 0"
        )
        return f"what has had no gradient is 0 and has to stay so, but {which}; dynamic8 and udynamic8 have a zero."
    if kind == "signed" and not (fmt.signed or q.scale.needs_integer or q.scale.has_offset):
        return f"it takes both signs, and {fmt} has no negative values; 'state8' or 'dynamic8 flat=256' has."
    if kind == "nonnegative" and fmt.signed and not has_zero:
        return f"it is never negative, and {fmt}, without a zero, would make it so; use 'udynamic8 flat=256'."
    if kind == "nonnegative" and any(part.center for part in (q, *inner)):
        return "most of it lies far below its mean and would be lost around it; leave center=mean out."
    if any(get_rounding(part.rounding).stochastic for part in inner):
        return "scales are not rounded stochastically; let scale_format round to the nearest."
    return None


def _nested(q: Quantizer) -> Iterator[Quantizer]:
    """The quantizers of its scales and offsets, of their scales and so on."""
    for part in (q.scale_format, q.offset_format):
        if isinstance(part, Quantizer):
            yield part
            yield from _nested(part)


def line_for(line: str | None, shape: tuple[int, ...]) -> str | None:
    """The line for a state of this shape: of a vector rank 1 is one scale for all, so it has blocks of 128 instead.

    Li et al. 2023, section 4.2: tensors of one dimension fall back to B128.
    """
    if line is None or len(shape) > 1 or not isinstance(quantizer(line).granularity, Rank1):
        return line
    return _in_blocks(line)


@cache
def _in_blocks(line: str) -> str:
    nested = isinstance(quantizer(line).scale_format, Quantizer)
    own = {} if nested else {"scale_format": "float32"}  # second moments would underflow flat's float16
    return str(Quantizer(line, flat=128, **own))


def check_shape(line: str, shape: tuple[int, ...]) -> None:
    """Raise GranularityError where a state of this shape can't be cut as the line, or its scales' own, asks."""
    q: str | Quantizer = quantizer(line)
    while isinstance(q, Quantizer):
        q.granularity.check(shape)
        shape, q = q.granularity.scale_shape(shape), q.scale_format


# -------------------------------------------------------------------------------------------------- codes and back
def encode(x: Tensor, line: str | None, generator: torch.Generator | None = None, *, keep_sign: bool = False) -> Kept:
    """float32 to codes and scales; zeros come back as zeros, in formats without a zero by a scale of 0.

    Li et al. 2023 take ``linear4`` for the second moment because it has no zero, which leaves 0 / 0 to a block that has
    seen no gradient; with a scale of 1 it would come back as 1/16 and never move again.
    """
    if line is None:
        return x
    kept = quantizer(line).quantize(x, generator=generator)
    assert isinstance(kept, BlockQTensor)
    return _with_signs(kept, x, line) if keep_sign else kept


def _with_signs(kept: BlockQTensor, x: Tensor, line: str) -> BlockQTensor:
    """Codes of 0 moved on to the neighbour on the side of ``x``, unless ``x`` is 0.

    bitsandbytes' CUDA kernels do so below 0 only: there 0 counts as positive.
    """
    fmt = quantizer(line).format
    (zero,) = (fmt.grid == 0).nonzero()[0]
    below, above = int(fmt.grid_codes[zero - 1]), int(fmt.grid_codes[zero + 1])
    lost = (kept.dequantize() == 0) & (x != 0)
    codes = kept.unpacked().masked_fill(lost & (x < 0), below).masked_fill(lost & (x > 0), above)
    return quantizer(line).pack(codes, kept.params)


def check_keeps_sign(lines: Mapping[str, str | None], kinds: Mapping[str, Kind]) -> None:
    """Raise SchemeError where ``keep_sign`` means nothing: no code for 0, or none at 0 but by an offset."""
    for name, line in lines.items():
        if line is None or kinds[name] == "nonnegative":
            continue
        fmt, scale = quantizer(line).format, quantizer(line).scale
        if not fmt.signed or not fmt.has_zero or scale.needs_integer or scale.has_offset:
            raise SchemeError(f"keep_sign: {name} is kept in {line!r}, which has no zero of its own; leave it out.")


def decode(kept: Kept, kind: Kind, device: torch.device) -> Tensor:
    """float32 on ``device``. An offset may leave what is never negative an ulp below 0; it comes back as 0."""
    if isinstance(kept, Tensor):
        return kept.to(device, torch.float32)
    kept = kept if kept.codes.device == device else kept.to(device)
    values = kept.dequantize()
    return values.clamp_min(0) if kind == "nonnegative" else values


def count_of(steps: float) -> Tensor:
    """The number of steps as it is kept: float32, on the CPU, whatever torch's defaults are (bfloat16 stops at 256)."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")


def each_tensor(kept: Kept, move: Callable[[Tensor], Tensor]) -> Kept:
    """The state with each of its tensors moved."""
    if isinstance(kept, Tensor):
        return move(kept)
    made = from_spec(kept.spec(), {name: move(t) for name, t in kept.tensors().items()})
    assert isinstance(made, BlockQTensor)
    return made


# ------------------------------------------------------------------------------------------------- in a state dict
def to_saved(kept: Kept, line: str | None) -> Tensor | dict[str, Any]:
    """Plain tensors, strings and numbers only: ``torch.load(weights_only=True)`` reads them."""
    return kept if isinstance(kept, Tensor) else {"quantizer": line, "spec": kept.spec(), **kept.tensors()}


def from_saved(saved: object, shape: tuple[int, ...], device: torch.device) -> tuple[Kept, str | None]:
    """The inverse of :func:`to_saved`: the state, on ``device``, and the line it was saved under.

    Raises:
        FileError: what was saved is no state of this shape, or its codes are no longer codes.
    """
    kept: Kept
    line = None
    if isinstance(saved, Tensor) and type(saved) in (Tensor, nn.Parameter) and saved.is_floating_point():
        kept = saved.detach().to(device, torch.float32, copy=True)  # a step writes into it
    elif isinstance(saved, Mapping) and isinstance(saved.get("quantizer"), str) and isinstance(saved.get("spec"), dict):
        q = Quantizer(saved["quantizer"])
        made = from_spec(saved["spec"], {k: t.to(device, copy=True) for k, t in saved.items() if isinstance(t, Tensor)})
        if not isinstance(made, BlockQTensor) or (made.format, made.granularity) != (q.format, q.granularity):
            raise FileError(f"it was saved as {q}, and its description says otherwise: {saved['spec']}.")
        kept, line = made, str(q)
    else:
        what = saved.dtype if type(saved) is Tensor else type(saved).__name__  # torchao's say that they are float32
        raise FileError(f"a state is a floating-point tensor or codes with their description; found {what}.")
    if tuple(kept.shape) != tuple(shape):
        raise FileError(f"it was saved with shape {list(kept.shape)}; the parameter here needs {list(shape)}.")
    return kept, line
