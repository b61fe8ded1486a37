"""What a checkpoint asks to be rounded beside its weights, in nybble's words: inputs, outputs, the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nybble.core.errors import FileError
from nybble.kv_format import fixed_at
from nybble.models.sources.layouts import FLOATS, Files, whole
from nybble.qtensor import Inverse, QuantParams

Args = Mapping[str, Any]
_MX = {
    4: "float4_e2m1fn group=32 scale=pow2(mode=even)",
    6: "float6_e2m3fn group=32 scale=pow2(mode=even)",
    8: "float8_e4m3fn group=32 scale=pow2(mode=rceil)",
}
"""Bits -> how compressed-tensors measures. Of 8 bits it takes the next power of two where the largest element would be
448 itself, and not only where it would be more."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A quantizer of what enters or leaves a module.

    Attributes:
        line: of the quantizer. scale, zero_point: names in the files, of a static one.
        above: of NVFP4's, what ``scale`` is of the scales of groups: their ``divisor``, or their ``factor``.
    """

    line: str
    scale: str = ""
    zero_point: str = ""
    above: str = ""

    def params(self, read: Callable[[str], Tensor]) -> QuantParams | None:
        """Scale and zero point, float32 [1], or NVFP4's divisor; None where they are measured on every tensor.

        Raises:
            FileError: the scale is no positive number.
        """
        if not self.scale:
            return None
        zero = read(self.zero_point).float().reshape(1).clone() if self.zero_point else None
        stored = read(self.scale).float().reshape(1).clone()
        scale = 1 / stored if self.above == "factor" else stored  # runtimes multiply inputs by the reciprocal too
        if not bool(scale.isfinite().all() and (scale > 0).all()):
            raise FileError(f"{self.scale} is {stored.item()}; a positive number is needed.")
        return QuantParams(Inverse(scale)) if self.above else QuantParams(scale, zero)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What is rounded beside weights.

    Attributes:
        inputs, outputs: by module, as the files call it. kv: a line for the cache, or one for each attention by
            name, as the files call it; or empty.
        used: names of tensors that say how, or that nothing is made of. matrices: of those that rotate inputs.
        left: what nybble won't round, in a line.
    """

    inputs: Mapping[str, Side] = field(default_factory=dict)
    outputs: Mapping[str, Side] = field(default_factory=dict)
    kv: str | Mapping[str, str] = ""
    used: frozenset[str] = frozenset()
    matrices: frozenset[str] = frozenset()
    left: str = ""


def dynamic_line(args: Args, what: str) -> str | None:
    """The quantizer of compressed-tensors' arguments, measured on every tensor; None where nybble has none.

    Raises:
        FileError: arguments that mean nothing.
    """
    bits, kind = whole(args.get("num_bits", 8), 1, 8, f"num_bits of {what}"), args.get("type", "int")
    shared, size = args.get("strategy"), args.get("group_size")
    if kind not in ("int", "float"):
        raise FileError(f"{what} has the type {kind!r:.40}; int and float are known.")
    if shared == "group" or (shared is None and size):
        size = whole(size, 1, 1 << 20, f"group_size of {what}")
        if kind == "float" and args.get("scale_dtype") == "torch.uint8":
            plain = bits in _MX and size == 32 and args.get("symmetric", True)
            return f"{_MX[bits]} scale_format=(float8_e8m0fnu scale=one)" if plain else None
        word = f"group={size} scale_format=float32"
    elif shared in ("token", "tensor", None):
        word = str(shared or "tensor")
    else:
        return None
    if args.get("scale_dtype") is not None:
        return None
    if kind == "float":
        return f"float8_e4m3fn {word}" if bits == 8 and args.get("symmetric", True) else None
    if args.get("symmetric", True):
        return f"int{bits}_full {word} scale=absmax(target={(1 << bits) / 2 - 0.5})" if bits > 1 else None
    return f"int{bits}_full {word} symmetric=false" if bits > 1 else None


def static_side(module: str, side: str, args: Args, files: Files) -> Side | None:
    """With the scale that the files have for a module; None where nybble has no such quantizer.

    Args:
        module: by its name.
        side: input or output.
        args: compressed-tensors' arguments.
        files: what there is.

    Raises:
        FileError: no such scale, or more than one number.
    """
    bits, symmetric = whole(args.get("num_bits", 8), 1, 8, f"num_bits of {module}"), args.get("symmetric", True)
    plain = args.get("strategy") in ("tensor", None) and args.get("scale_dtype") is None and not args.get("group_size")
    if not plain or bits < 2 or (args.get("type") == "float" and (bits != 8 or not symmetric)):
        return None
    scale, zero = f"{module}.{side}_scale", "" if symmetric else f"{module}.{side}_zero_point"
    files.any_of(scale, FLOATS, ((), (1,), (1, 1)))
    if zero:
        files.any_of(zero, ("I8", *FLOATS), ((), (1,), (1, 1)))
    fmt = "float8_e4m3fn" if args.get("type") == "float" else f"int{bits}_full"
    return Side(line=f"{fmt} tensor static{'' if symmetric else ' symmetric=false'}", scale=scale, zero_point=zero)


def nvfp4_side(scale: str, above: str, files: Files) -> Side | None:
    """NVFP4's inputs: groups of 16 measured under one calibrated number; None where the files don't have it.

    Args:
        scale: the number's name.
        above: see :class:`Side`.
        files: what there is.

    Raises:
        FileError: more than one number, or none.
    """
    if scale not in files.entries:
        return None
    files.any_of(scale, ("F32",), ((), (1,)))
    return Side(line="nvfp4-ct static", scale=scale, above=above)


ONE = "float8_e4m3fn tensor scale=one"
"""A cache of E4M3 whose scales are 1."""


def fixed_cache(files: Files, holders: Mapping[str, str]) -> str | dict[str, str]:
    """An E4M3 cache with a scale a layer for keys, and one for values.

    Args:
        files: what there is.
        holders: ``k_scale`` and ``v_scale``, how their modules end: empty of the attention's own, ``.k_proj``.

    Returns:
        :data:`ONE` where all are 1, or a line for each attention; empty where keys or values of one have none.

    Raises:
        FileError: a scale that is no positive number.
    """
    sides: list[dict[str, float]] = []
    for leaf, holder in holders.items():
        ending = f"{holder}.{leaf}"
        names = [name for name in files.entries if name.endswith(ending)]
        for name in names:
            files.any_of(name, FLOATS, ((), (1,), (1, 1)))
        sides.append({name.removesuffix(ending): files.small(name).float().item() for name in names})
    keys, values = sides
    bad = next((n for side in sides for n, scale in side.items() if not 0 < scale < float("inf")), None)
    if bad is not None:
        raise FileError(f"{files.place}: a scale of {bad}'s KV cache is no positive number.")
    if keys.keys() != values.keys():
        return ""
    if all(scale == 1 for side in sides for scale in side.values()):
        return ONE
    lines = {name: [str(fixed_at("float8_e4m3fn", side[name])) for side in sides] for name in keys}
    return {name: f"keys=({k}) values=({v})" for name, (k, v) in lines.items()}


def not_rounded(activations: bool, cache: bool, why: str = "") -> str:
    """The line that says what stays in float."""
    named = " and ".join(w for w, asked in (("activations", activations), ("the KV cache", cache)) if asked)
    return f"The checkpoint asks for quantized {named} too{why}; here they stay in float." if named else ""
