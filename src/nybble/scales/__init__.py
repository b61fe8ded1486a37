"""From a block of values to its scale, and zero point or offset: one rule a file.

A rule is a frozen dataclass; its fields are its options in a quantizer line: ``scale=mse(grid=80,low=0.4)``. It sees
blocks ``[blocks, elements]`` in float32 and knows nothing of how they were cut.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from nybble.core.arithmetic import divided
from nybble.core.errors import UsageError
from nybble.core.registry import Registry
from nybble.core.shapes import Float32, Integer
from nybble.formats import NumberFormat

if TYPE_CHECKING:
    from torch import Tensor

REGISTRY = Registry("nybble.scales", "scale rule", lambda part: isinstance(part, type) and issubclass(part, ScaleRule))


@dataclass(frozen=True)
class BlockParams:
    """What a rule found: ``x_hat = scale * (value - zero_point)``, or ``scale * value + offset``.

    Each is float32 [blocks, 1]; ``over``, where the rule fixes the scale of the scales too, is that one's reciprocal,
    float32, one element. A rule that is told how they are stored (:class:`Storage`) gives the scales of nested scales
    and offsets in ``outer`` and ``offset_outer``, float32, in the order of its groups.
    """

    scale: Float32[Tensor, "blocks 1"]
    zero_point: Float32[Tensor, "blocks 1"] | None = None
    offset: Float32[Tensor, "blocks 1"] | None = None
    over: Float32[Tensor, " ..."] | None = None
    outer: Float32[Tensor, " _outer"] | None = None
    offset_outer: Float32[Tensor, " _outer"] | None = None


@dataclass(frozen=True)
class Storage:
    """How scales or offsets are stored: in ``dtype``, or as codes of ``format`` over an outer scale in ``dtype``.

    Attributes:
        dtype: float32, float16 or bfloat16. format: of nested ones.
        groups: int64 [groups, blocks of one]: those that share an outer scale.
    """

    dtype: str = "float32"
    format: NumberFormat | None = None
    groups: Integer[Tensor, "_groups _shared"] | None = None


@dataclass(frozen=True)
class ScaleRule(ABC):
    """A way to find the scale of a block. A block of zeros gets scale 0 here; who uses it decides what that means.

    Attributes:
        scale_format: what its scales are stored in where a line doesn't say; empty leaves it to the granularity.
        judges_stored: ``nested`` or ``always``, where :meth:`fit` takes ``project`` too, for nested scales or for all:
            (scales [blocks, 1], ``over`` or None) -> what would be stored of them; ``ratios`` for nested ones under an
            outer scale that isn't rounded itself.
        takes_storage: whether :meth:`fit` takes ``scales`` and ``offsets`` too, how they are stored (:class:`Storage`).
        takes_divisor: whether a divisor of nested scales that was calibrated can be given (:meth:`TwoLevel.under`), so
            that static activations may have such scales.
    """

    scale_format: ClassVar[str] = ""
    judges_stored: ClassVar[Literal["", "nested", "ratios", "always"]] = ""
    takes_storage: ClassVar[bool] = False
    takes_divisor: ClassVar[bool] = False

    @property
    def phases(self) -> int:
        """How many numbers are tried for each outer scale of nested ones, from its own on to short of twice that.

        Kept is the one under which its blocks lose least together.
        """
        return 1

    @property
    def weighs(self) -> bool:
        """Whether solvers that know the energy of the inputs give it to :meth:`fit` as the weight."""
        return False

    @property
    def needs_integer(self) -> bool:
        """Whether only integer formats will do (there is a zero point)."""
        return False

    @property
    def has_offset(self) -> bool:
        """Whether the rule finds an offset in the units of x."""
        return False

    @property
    def two_level(self) -> bool:
        """Whether the rule finds the scale of the scales too, so that they need a format of their own."""
        return False

    @property
    def averages(self) -> bool:
        """Whether static activations show it every batch by itself (:meth:`averaged`), not all values at once."""
        return False

    def averaged(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Low and high end, float32 [1, 1], of values that came batch by batch, for :meth:`fit_ends`."""
        raise NotImplementedError(f"{self} averages nothing")

    def fit_ends(self, low: Tensor, high: Tensor, fmt: NumberFormat) -> BlockParams:
        """The parameters for such ends."""
        raise NotImplementedError(f"{self} averages nothing")

    def check_scales(self, fmt: NumberFormat | None) -> None:  # noqa: B027  (most rules' can be stored in any)
        """Raise SchemeError where its scales can't be stored in ``fmt``; None means in a plain dtype."""

    @abstractmethod
    def fit(
        self,
        blocks: Float32[Tensor, "blocks elements"],
        fmt: NumberFormat,
        rounding: str,
        weight: Float32[Tensor, "#blocks #elements"] | None = None,
    ) -> BlockParams:
        """Find the parameters.

        Args:
            blocks: float32 [blocks, elements].
            fmt: format of the elements.
            rounding: name of the rounding that will be used.
            weight: importance of each element, >= 0, [blocks, elements] or broadcasting; None counts all alike. Padding
                has weight 0.
        """

    def whole(
        self,
        blocks: Float32[Tensor, "blocks elements"],
        fmt: NumberFormat,
        weight: Float32[Tensor, "#blocks #elements"] | None = None,
    ) -> Float32[Tensor, "blocks 1"]:
        """The scales that clip nothing: what a rule that judges scales as stored has their own scale fitted to.

        Arguments as :meth:`fit`.
        """
        return divided(blocks.abs().amax(1, keepdim=True), fmt.absmax)

    def allowed(self, scale: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """The nearest scales that the rule could give, for scales that something else found: float32, positive."""
        return scale

    def __str__(self) -> str:
        name = type(self).__module__.rsplit(".", 1)[-1].replace("_", "-")
        changed = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return name + (f"({','.join(changed)})" if changed else "")


def parse_scale_rule(text: str) -> ScaleRule:
    """``mse`` or ``mse(grid=80,low=0.4)`` as a rule.

    Raises:
        UsageError: unknown rule or option, or a value of the wrong kind; names what there is.
    """
    match = re.fullmatch(r"([\w-]+)(?:\((.*)\))?", text.strip())
    if match is None:
        raise UsageError(
            f"scale={text!r} is not a rule. Known: {', '.join(REGISTRY.names())}; options as in mse(grid=80)."
        )
    rule: type[ScaleRule] = REGISTRY.get(match[1])
    fields = {f.name: f for f in dataclasses.fields(rule)}
    options: dict[str, object] = {}
    for item in (match[2] or "").split(","):
        if not item.strip():
            continue
        key, _, value = item.partition("=")
        if key.strip() not in fields:
            raise UsageError(
                f"scale rule {match[1]!r} has no option {key.strip()!r}. It has: {', '.join(fields) or 'none'}."
            )
        options[key.strip()] = _convert(match[1], key.strip(), value.strip(), fields[key.strip()].default)
    return rule(**options)


def _convert(rule: str, key: str, value: str, default: object) -> object:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UsageError(f"{rule}({key}={value}): say true or false.")
        return value.lower() == "true"
    if isinstance(default, str):
        return value
    try:
        return int(value) if isinstance(default, int) else float(value)
    except ValueError as error:
        raise UsageError(f"{rule}({key}={value}) is not a number.") from error


def _text(value: object) -> str:
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).lower()
