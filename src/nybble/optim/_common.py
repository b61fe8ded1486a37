"""The arguments that every optimizer takes besides its rule's, by our names and by those of others.

Code written for ``torch.optim``, bitsandbytes or torchao goes on with only its import changed. What has one legal value
here is taken with that value and refused with any other: no argument is ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from nybble.core.errors import UsageError
from nybble.optim._states import StateChoice
from nybble.optim._weights import Weights


class Common(TypedDict, total=False):
    """Keyword arguments of every optimizer.

    Attributes:
        state: what the rule's states are kept in: a preset pair (``state8``, ``state4``), any dynamic quantizer line
            for all, a mapping with one for each, or None for float32. A group may have its own ``state``, ``min_size``,
            ``weights`` and ``keep_sign``.
        min_size: parameters with fewer elements keep float32 states.
        seed: of stochastic rounding; not used by others.
        weights: how bfloat16 parameters are rounded after a step: ``nearest``, ``stochastic``, or ``residual8``, which
            keeps eight more bits of each in the state: a master copy of 24 bits.
        keep_sign: a state of both signs that is not 0 is never rounded to 0 but to the smallest value of its sign.
        is_paged: parameters of 100,000 elements and more have their states in the host's memory (pinned, where there is
            a GPU); they are copied to the device for an update and back. bitsandbytes' name.
        optim_bits: bitsandbytes' 8 or 32, for ``state="state8"`` or None.
        min_8bit_size: bitsandbytes' name of ``min_size``.
        block_size: torchao's; elements that share a scale.
        bf16_stochastic_round: torchao's name of ``weights="stochastic"``.
        fused: False leaves every step to the rule, by torch's operators; otherwise a kernel steps what it fits, with
            the same bits, and writes states in place (:meth:`LowBitOptimizer.kernels` says which).
    """

    state: StateChoice
    min_size: int
    seed: int
    weights: Weights
    keep_sign: bool
    is_paged: bool
    optim_bits: int
    min_8bit_size: int
    block_size: int
    bf16_stochastic_round: bool
    amsgrad: bool
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    args: None
    percentile_clipping: int
    block_wise: bool


FIXED: dict[str, tuple[object, ...]] = {
    "amsgrad": (False, None),
    "maximize": (False, None),
    "foreach": (None, False),
    "capturable": (False, None),
    "differentiable": (False, None),
    "args": (None,),
    "percentile_clipping": (100,),
    "block_wise": (True,),
}
"""Arguments of others and the values that mean what is done here."""
SWITCHES: dict[str, tuple[object, ...]] = {"fused": (None, True, False)}
"""Those of others that mean something here, beside what :func:`translate` gives."""

_ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "min_8bit_size": ("min_size", lambda size: size),
    "bf16_stochastic_round": ("weights", lambda on: "stochastic" if on else "nearest"),
}


def translate(given: Mapping[str, Any], own: Mapping[str, Any], bits: int | None, name: str) -> dict[str, Any]:
    """Ours of what was given: ``state``, ``min_size``, ``seed``, ``weights``, ``keep_sign``, ``is_paged``.

    Args:
        given: a :class:`Common`.
        own: ours by their defaults.
        bits: that a preset stands for; None for a rule, whose ``optim_bits`` chooses the state.
        name: of the optimizer, for messages.

    Raises:
        UsageError: an argument said twice, or with a value that is not served.
        TypeError: an argument that nobody has, as Python says it.
    """
    ours = {key: value for key, value in given.items() if key in own}
    for key, value in given.items():
        if key in own:
            continue
        if (legal_ones := (FIXED | SWITCHES).get(key)) is not None:
            if not any(value is legal or (type(value) is type(legal) and value == legal) for legal in legal_ones):
                raise UsageError(f"{name} has no {key}={value!r}; leave it out, or use the library's that has it.")
            continue
        if key not in (*_ALIASES, "optim_bits", "block_size"):
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
        if key == "optim_bits" and bits is not None:
            _check_bits(value, bits, name)
            continue
        target, ours_of_it = _translated(key, value, own["state"], name)
        if target in ours:
            raise UsageError(f"{name}: {key} is another name of {target}; give one of them.")
        ours[target] = ours_of_it
    return {**own, **ours}


def _check_bits(given: object, bits: int, name: str) -> None:
    """A preset's bits are in its name; its peers take 32, their default, without a meaning."""
    if given not in (32, bits):
        raise UsageError(f"{name}: optim_bits is {bits} here; got {given!r}.")


def _translated(key: str, value: Any, state: StateChoice, name: str) -> tuple[str, Any]:
    """Our argument for another's."""
    if key in _ALIASES:
        target, convert = _ALIASES[key]
        return target, convert(value)
    if key == "optim_bits":
        if value not in (8, 32):
            raise UsageError(
                f"{name}: optim_bits is 8 or 32; say others as a state: state='state4'. Got optim_bits={value!r}."
            )
        return "state", "state8" if value == 8 else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}: block_size is a whole number >= 1; got {value!r}.")
    if state is None:
        raise UsageError(f"{name} keeps float32 states, which have no blocks; leave block_size out.")
    return "state", f"{state} flat={value} scale_format=float32"


class WholeSignature:
    """The signature of an optimizer's class, with :class:`Common` spelled out, for whoever asks ``inspect`` or help."""

    def __get__(self, instance: object, owner: Any) -> inspect.Signature:
        """Of ``owner``'s constructor."""
        named = [p for p in inspect.signature(owner.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
        defaults = {key: FIXED.get(key, (None,))[0] for key in Common.__annotations__} | owner._own()
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature([*named, *(inspect.Parameter(k, kind, default=d) for k, d in defaults.items())])
