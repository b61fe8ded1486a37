"""A saved state dict brought into the form that an optimizer keeps, before anything of the optimizer changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import FileError, SchemeError, UsageError, within
from nybble.optim._states import Kept, Kind, count_of, decode, encode, from_saved


@dataclass(frozen=True)
class Sealed:
    """A value that torch's ``load_state_dict`` passes on untouched.

    It casts every tensor of a state, also those in dicts and lists, to the parameter's dtype: codes would become
    floats, and float32 scales of a bfloat16 parameter would lose 16 bits.
    """

    value: Any


def unseal(optimizer: torch.optim.Optimizer) -> None:
    """Take the values out again."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Sealed):
                state[key] = value.value


def check_is_saved(saved: object) -> None:
    """Raise FileError for what isn't an optimizer's state dict."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping) or "param_groups" not in saved:
        raise FileError("this is not an optimizer's state dict: it has no 'state' and 'param_groups'.")


def matched_groups(own: list[dict[str, Any]], saved: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each parameter group with its saved one.

    Raises:
        FileError: that isn't an optimizer's state dict, or has states of what no group has. UsageError: other groups,
            or another number of parameters.
    """
    check_is_saved(saved)
    theirs = list(saved["param_groups"])
    sizes, found = ([len(group["params"]) for group in groups] for groups in (own, theirs))
    if sizes != found:
        raise UsageError(
            f"the state dict has {len(found)} parameter group(s) of {found} parameters; this optimizer has "
            f"{len(sizes)} of {sizes}. Build it over the same parameters in the same groups."
        )
    strays = saved["state"].keys() - {index for group in theirs for index in group["params"]}
    if strays:
        raise FileError(
            f"there are states of {', '.join(sorted(map(repr, strays)))}, which its groups don't have; are its keys "
            "those that were saved? (JSON makes text of numbers.)"
        )
    return list(zip(own, theirs, strict=True))


def restore_entry(
    place: str,
    entry: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    lines: Mapping[str, str | None],
    kinds: Mapping[str, Kind],
    device: torch.device,
    draw: Callable[[str], torch.Generator | None] | None,
) -> dict[str, Sealed]:
    """One parameter's saved states as this optimizer keeps them.

    Args:
        place: the parameter's name, for messages.
        entry: what was saved for the parameter.
        shapes: of the states.
        lines: what each is kept in here.
        kinds: of the states.
        device: for them.
        draw: the generator for rounding a state anew; None refuses to convert.

    Raises:
        SchemeError: saved in another quantizer, and not to be converted. FileError: not this optimizer's states.
    """
    entry = {name: value for name, value in entry.items() if value is not None}  # torch's SGD before a momentum
    if set(entry) != {"step", *shapes}:
        raise FileError(
            f"{place}: {', '.join(sorted(entry))} were saved; {', '.join(sorted({'step', *shapes}))} are kept here. "
            "Load it into the rule, with the options and over parameters of the shapes, that it was saved with."
        )
    restored = {}
    with within(f"{place}: step"):
        restored["step"] = Sealed(_step(entry["step"]))
    for name, shape in shapes.items():
        with within(f"{place}: {name}"):
            kept, line = from_saved(entry[name], shape, device)
            if line != lines[name]:
                kept = _converted(kept, line, lines[name], kinds[name], draw and draw(name), draw is not None)
        restored[name] = Sealed(kept)
    return restored


def restore_residual(place: str, saved: object, p: Tensor, device: torch.device) -> Sealed:
    """The residual of a bfloat16 parameter, on a device.

    Raises:
        FileError: it isn't one, or is of another parameter.
    """
    if not isinstance(saved, Tensor) or saved.dtype != torch.int8 or saved.shape != p.shape:
        found = f"{saved.dtype} {list(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        raise FileError(f"{place}: residual: int8 of shape {list(p.shape)} belongs here; found {found}.")
    return Sealed(saved.detach().to(device, copy=True))  # a step writes into it


def _converted(
    kept: Kept, old: str | None, new: str | None, kind: Kind, generator: torch.Generator | None, allowed: bool
) -> Kept:
    if not allowed:
        raise SchemeError(
            f"it was saved as {old or 'float32'!r}, and is kept here as {new or 'float32'!r}. Build the optimizer with "
            "the state (and min_size) that it was saved with, or round it anew: load_state_dict(..., convert=True)."
        )
    device = kept.device if isinstance(kept, Tensor) else kept.codes.device
    return encode(decode(kept, kind, device), new, generator)


def _step(saved: object) -> Tensor:
    """float32, one element, on the CPU, as torch keeps it."""
    try:
        step = float(saved)  # type: ignore[arg-type]  # a tensor, an int, or whatever the file holds
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if step < 0 or not step.is_integer():
        raise FileError(f"this is the number of steps taken; found {saved!r}.")
    return count_of(step)
