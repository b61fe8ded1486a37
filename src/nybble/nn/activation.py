"""Activations on their way into (or out of) a module: measured on every tensor, or with one calibrated scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, SchemeError
from nybble.kv_format import tokens_apart
from nybble.learned.ste import following
from nybble.nn.compiled import fake_quantize, static_params
from nybble.nn.float_products import rounds_to_floats
from nybble.nn.input_rounding import rounded_inputs
from nybble.nn.integer_products import rounds_to_integers
from nybble.nn.products import DEVICES
from nybble.ops.reaching import reaching
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams, dense
from nybble.quantizer import Quantizer

_PARTS = ("scale", "zero_point", "offset", "divisor", "shift", "thresholds")
"""Divisor: of nested scales; the rest: see QuantParams."""


class ActivationQuantizer(nn.Module):
    """Fake-quantizes what passes; a gradient goes straight through, where nothing was clipped (Bengio et al. 2013).

    Args:
        quantizer: the specification; a static one has a granularity that is calibrated once.
        params: for a static quantizer: calibrated scale, zero point, offset, one value each. A Factored scale is kept
            as its granularity stores it: of a shifted one, the columns' exponents as integers (``shifts``, uint8).

    Attributes:
        relearned: whether thresholds were learned: one that is taken off what enters
            (:class:`nybble.learned.elastic.Elastic`), or all of them (:class:`nybble.learned.thresholds.Thresholds`).
        whole: whether what passes is integers of up to 8 bits times one scale a row (products of whole numbers).
        few: whether it is what tensor cores read (:mod:`nybble.nn.float_products`).
        through: whether the gradient goes through measured scales too (:class:`nybble.learned.ste.Ste`).
    """

    def __init__(self, quantizer: Quantizer, params: QuantParams | None = None) -> None:
        super().__init__()
        check_static(quantizer)
        if (params is None) == quantizer.static:
            raise FileError(f"{quantizer}: a static quantizer, and only that, comes with calibrated parameters.")
        self.quantizer, self._line = quantizer, str(quantizer)
        self.relearned = params is not None and relearned(params)  # which no kernel knows
        self.whole = rounds_to_integers(quantizer) and not self.relearned
        self.few = rounds_to_floats(quantizer) and not self.relearned
        self.through = False
        for part, value in _parts(quantizer, params).items():
            self.register_buffer(part, value)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        parts = {part: value for part, value in self._buffers.items() if value is not None}
        training = torch.is_grad_enabled() and x.requires_grad  # what trains in front of it is not to stand still
        if training and self.through and not parts:
            soft: Tensor = self.quantizer.soft(x, following(self.quantizer, x), reaching)
            return soft
        if training or torch.compiler.is_compiling():
            rounded: Tensor = fake_quantize(x, list(parts.values()), " ".join(parts), self._line)
            return rounded
        if not parts and x.device.type in DEVICES and isinstance(x, Tensor):
            return rounded_inputs(x, self._line)
        return self.quantizer.fake_quantize(x, static_params(self.quantizer, parts))

    def arguments(self) -> tuple[list[Tensor], str, str]:
        """Static parameters, their names and the line, as operators take them."""
        parts = {part: value for part, value in self._buffers.items() if value is not None}
        return list(parts.values()), " ".join(parts), self._line

    @property
    def watched(self) -> bool:
        """Whether a call of it is more than its forward: somebody looks at what passes, or brings its tensors."""
        return bool(self._forward_hooks or self._forward_pre_hooks) or hasattr(self, "_hf_hook")

    def params(self) -> QuantParams | None:
        """The calibrated parameters of a static quantizer; None where every tensor is measured."""
        return static_params(self.quantizer, {p: value for p, value in self._buffers.items() if value is not None})

    def _apply(self, fn: Any, recurse: bool = True) -> ActivationQuantizer:
        # Scales stay float32: only moves between devices pass.
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def roles(self) -> dict[str, str]:
        """For each name of the state dict: scales, offsets, or tables."""
        known = {**dict.fromkeys(("zero_point", "offset", "shift"), "offsets"), "thresholds": "tables"}
        return {name: known.get(name, "scales") for name in self.state_dict()}

    def to_dict(self) -> dict[str, object]:
        """Line and the names of static parameters, for config.json; with a value a column, how many there are."""
        found = {part: value for part, value in self._buffers.items() if value is not None}
        of_columns = (*self.quantizer.granularity.stored, "shift")
        widths = [
            found[part].numel() for part in of_columns if part in found and (part != "shift" or len(found[part]) > 1)
        ]
        static = {"static": list(found)} if found else {}
        return {"quantizer": str(self.quantizer), **static, **({"columns": widths[0]} if widths else {})}

    @staticmethod
    def from_dict(data: dict[str, object]) -> ActivationQuantizer:
        """Inverse of :meth:`to_dict` with empty parameters, for a checkpoint to fill."""
        quantizer, static = Quantizer(str(data["quantizer"])), data.get("static", [])
        granularity = quantizer.granularity
        known = (*_PARTS, *granularity.stored)
        if not isinstance(static, list) or not set(static) <= set(known):
            raise FileError(
                f"static parameters of an activation quantizer are among {', '.join(known)}; got {static!r}."
            )
        if quantizer.scale.takes_divisor != (static == ["divisor"]) and (static or quantizer.static):
            raise FileError(f"static parameters of {quantizer} can't be {static!r}.")
        if not static:
            return ActivationQuantizer(quantizer)
        found = {part: torch.empty(1, dtype=torch.float32) for part in static}
        if "divisor" in found:
            return ActivationQuantizer(quantizer, QuantParams(Inverse(found["divisor"])))
        if "shift" in found and "columns" in data:
            found["shift"] = torch.empty(_columns(data), dtype=torch.float32)
        if "thresholds" in found:
            found["thresholds"] = torch.empty(len(quantizer.format.grid) - 1, dtype=torch.float32)
        scale: Tensor | Factored | None = found.get("scale")
        if not granularity.stored.keys().isdisjoint(found):
            columns = _columns(data)
            if not {"scale", *granularity.stored} <= set(found):
                names = ", ".join(granularity.stored)
                raise FileError(f"{names} of columns go with a scale; got {data!r}.")
            found |= {
                part: torch.zeros(columns, dtype=getattr(torch, dtype)) for part, dtype in granularity.stored.items()
            }
            scale = Factored(granularity.restore(found), granularity.combine)
        shift, thresholds = found.get("shift"), found.get("thresholds")
        params = QuantParams(scale, found.get("zero_point"), found.get("offset"), thresholds, shift=shift)
        return ActivationQuantizer(quantizer, params)

    def extra_repr(self) -> str:  # noqa: D102
        return str(self.quantizer)


def relearned(params: QuantParams) -> bool:
    """Whether thresholds were learned, so that a scale alone doesn't say what is rounded to what."""
    return params.shift is not None or params.thresholds is not None


def _columns(data: dict[str, object]) -> int:
    """How many columns have a value each.

    Raises:
        FileError: it isn't said.
    """
    columns = data.get("columns")
    if not isinstance(columns, int) or columns < 1:
        raise FileError(f"values of columns go with a number of columns; got {data!r}.")
    return columns


def _parts(quantizer: Quantizer, params: QuantParams | None) -> dict[str, Tensor | None]:
    """The buffers of static parameters."""
    found: dict[str, Tensor | None] = dict.fromkeys((*_PARTS, *quantizer.granularity.stored))
    if params is None:
        return found
    for part in _PARTS[:3]:
        value = getattr(params, part)
        if isinstance(value, Tensor | QTensor):
            found[part] = dense(value).reshape(1)
    for part in ("shift", "thresholds"):
        value = getattr(params, part)
        if value is not None:
            found[part] = value.float().reshape(-1)
    if isinstance(params.scale, Inverse):
        found["divisor"] = params.scale.divisor.reshape(1)
    if isinstance(params.scale, Factored):
        found |= quantizer.granularity.store([dense(factor) for factor in params.scale.factors])
    return found


def check_static(quantizer: Quantizer) -> None:
    """Raise SchemeError for a static quantizer that one calibrated value can't serve."""
    fixed = quantizer.granularity.calibrated_on and quantizer.scale_format == "float32"
    if quantizer.static and not fixed and not quantizer.scale.takes_divisor:
        raise SchemeError(
            f"{quantizer}: static activations have one float32 scale for the tensor, or one divisor of the scales of "
            "its blocks; write 'tensor', 'shifted' or 'scale=two-level' (nvfp4-ct static), or leave out 'static'."
        )


def measured_over_tokens(root: nn.Module) -> dict[str, Quantizer]:
    """Quantizers of activations whose scales are measured on several tokens at once, by name.

    What they make of a token depends on the others of its batch, padding among them: one prompt alone comes to other
    numbers than in a batch. With a scale of each token (``token``, ``group=N``) or a calibrated one (``static``)
    nothing does. NVFP4's measured outer scale is one of the tensor, too.
    """
    found = {name: m.quantizer for name, m in root.named_modules() if isinstance(m, ActivationQuantizer)}
    return {name: q for name, q in found.items() if not q.static and not tokens_apart(q)}
