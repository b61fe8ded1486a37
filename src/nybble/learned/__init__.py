"""Quantizers whose parameters a gradient moves: what reconstruction learns and quantization-aware training estimates.

A *part* (one file, ``PART``) is a frozen dataclass of options that makes a :class:`Learned` for one tensor: an
``nn.Module`` that can stand wherever a tensor is rounded::

    part = make_part("lsq", {})
    learned = part.make(Quantizer("int4 channel"), weight)  # begins at round-to-nearest
    loss = f(learned(weight)) + learned.penalty(t)  # the paper's training formula, with gradients
    stored = learned.eval().settle(weight)  # a QTensor; eval forward is its dequantize()

=============  =======================================================================================
training       ``forward(x)``: the formula of the paper, differentiable in x and in the part's parameters
eval           ``forward(x) == settle(x).dequantize(x.dtype)``, bit for bit, without gradients; of
               activations, ``quantizer.fake_quantize(x, settle(x))``
at the start   eval forward is round-to-nearest under ``quantizer``, or under ``start``'s parameters; a
               class that begins elsewhere because its paper does says so
state          every tensor that training moves, or that the start decided, is in the state dict: ``make`` with the same
               arguments, then ``load_state_dict``, goes on exactly
=============  =======================================================================================

A window of blocks runs in eval mode (no dropout) while its learned parts are in training mode: ``train()`` on those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import SchemeError
from nybble.core.registry import Registry
from nybble.core.shapes import Float, Float32
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.one import One

REGISTRY = Registry("nybble.learned", "learned part", lambda part: isinstance(part, type) and issubclass(part, Part))
WEIGHTS, ACTIVATIONS = "weights", "activations"
_WIDEST = 2.0**63
"""The largest value under a scale of its own that can be learned: the scale's gradient has this square in it."""


class Learned(nn.Module, ABC):
    """The learned quantization of one tensor.

    Args:
        quantizer: what it settles to.
        side: ``weights``, or ``activations``.

    Attributes:
        nearest: whether each element settles to the level that is nearest to it, and not to one that is decided
            otherwise: then it has a distance to the next level.
    """

    nearest: bool = True

    def __init__(self, quantizer: Quantizer, side: str) -> None:
        super().__init__()
        self._quantizer, self.side = quantizer, side

    @property
    def quantizer(self) -> Quantizer:
        """What it settles to."""
        return self._quantizer

    def forward(self, x: Float[Tensor, "*shape"], dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
        """Fake-quantized ``x`` (any dtype), of its shape: see the module's table; cast to ``dtype``, if any."""
        if self.training:
            return self.estimate(x) if dtype is None else self.estimate_in(x, dtype)
        found = self.rounded(x)
        return found if dtype is None else found.to(dtype)

    @abstractmethod
    def estimate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The training formula; shape and dtype of ``x``, calculated in float32."""

    def estimate_in(self, x: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """:meth:`estimate`, cast; what a part does in one pass over memory, where it can."""
        return self.estimate(x).to(dtype)

    @abstractmethod
    def settle(self, x: Float[Tensor, "*shape"]) -> QTensor | QuantParams:
        """What training came to: for weights ``x`` rounded and packed, for activations the parameters to round with."""

    def rounded(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The settled values, in the dtype of ``x``; no gradient."""
        settled = self.settle(x.detach())
        if isinstance(settled, QTensor):
            return settled.dequantize(x.dtype)
        return self.quantizer.fake_quantize(x, settled)

    def lookup(self, x: Float[Tensor, "rows columns"], ids: Tensor, padding: int | None = None) -> Tensor:
        """Some rows of what :meth:`forward` makes of a table.

        A part whose rows depend on themselves alone may leave the others as they are.

        Args:
            x: the table.
            ids: int64 [...], of rows.
            padding: a row that gets no gradient.

        Returns:
            [..., columns], of the dtype of ``x``.
        """
        return functional.embedding(ids, self(x), padding)

    def fixed(self) -> QuantParams | None:
        """Of activations: the parameters that don't depend on the tensor; None where each is measured anew."""
        return None

    def removed(self, x: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"] | None:
        """What is taken off a weight before it is rounded, and not put back; None: nothing is."""
        return None

    def penalty(self, t: float | Float32[Tensor, ""]) -> Float32[Tensor, ""]:
        """What the part adds to the loss.

        Args:
            t: progress of training, 0 to 1; a tensor where the step is recorded and replayed: nothing may be decided
                by its value then.

        Returns:
            float32 scalar; 0 unless the part's paper has such a term.
        """
        return torch.zeros((), dtype=torch.float32)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by learning-rate group; the groups are those that the part names."""
        return {}

    def _apply(self, fn: Any, recurse: bool = True) -> Learned:
        # Everything here is float32 by contract: only moves between devices pass.
        super()._apply(lambda t: _keep_dtype(t, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.quantizer}, {self.side}"


class Part(ABC):
    """The options of a kind of Learned: subclasses are frozen keyword-only dataclasses.

    Attributes:
        sides: what it can stand for, ``weights`` and ``activations``.
        groups: names of its learning-rate groups: the keys of :meth:`Learned.groups`.
        takes_start: whether it can begin with a solver's parameters.
        registry: where parts are found by name, for options that name one.
        fixes_x: whether the weight stays what it was at :meth:`make`, without a gradient (AdaRound).
        keeps_codes: whether codes stay those that a solver left (GPTQ's, say): :meth:`make` should get the dequantized
            weight then, not the float one.
        soft: whether the training formula gives values between those that are stored, so that its loss isn't theirs.
    """

    sides: ClassVar[tuple[str, ...]] = (WEIGHTS, ACTIVATIONS)
    groups: ClassVar[tuple[str, ...]] = ()
    takes_start: ClassVar[bool] = True
    registry: ClassVar[Registry] = REGISTRY
    fixes_x: ClassVar[bool] = False
    keeps_codes: ClassVar[bool] = False
    soft: ClassVar[bool] = False

    def check(self, quantizer: Quantizer, side: str = WEIGHTS) -> None:
        """Whether it can be learned.

        Raises:
            SchemeError: names what can't be and what can.
        """
        name = part_name(self)
        if side not in self.sides:
            raise SchemeError(f"{name} learns {' and '.join(self.sides)}, not {side}.")
        if get_rounding(quantizer.rounding).stochastic:
            raise SchemeError(
                f"{name} can't learn {quantizer}: stochastic rounding draws anew at every call, so nothing would stay "
                "settled; use rounding=nearest-even."
            )
        if side == WEIGHTS and quantizer.static:
            raise SchemeError(f"{name}: 'static' is for activations; weights always keep their own scales.")
        if (
            side == WEIGHTS
            and quantizer.format.min >= 0
            and not (quantizer.scale.needs_integer or quantizer.scale.has_offset)
        ):
            raise SchemeError(
                f"{name}: weights are signed and {quantizer} is not; add symmetric=false or use a signed format."
            )
        if quantizer.format.absmax > _WIDEST and not isinstance(quantizer.scale, One):
            fmt = quantizer.format
            raise SchemeError(
                f"{name} can't learn {quantizer}: values of {fmt.name} reach {fmt.absmax:.2g}, so its scales come near "
                "float32's smallest number, where gradients through them overflow, and float16 can't store them; "
                f"use a format of a narrower range (float8_e5m2){', or scale=one' * fmt.signed}."
            )
        self.check_more(quantizer, side)

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: B027  most parts add something, some nothing
        """What else the part asks of a quantizer; raises SchemeError."""

    def make(
        self,
        quantizer: Quantizer,
        x: Tensor,
        start: BlockQTensor | QuantParams | None = None,
        side: str = WEIGHTS,
    ) -> Learned:
        """A Learned for one tensor.

        Args:
            quantizer: the specification.
            x: the weight, or an example of the activations; float32, float16 or bfloat16.
            start: parameters to begin with instead of ``quantizer.fit(x)``: a solver's result or its parameters. Of a
                QTensor whose codes are not the nearest ones (GPTQ's), give its ``dequantize()`` as the weight.
            side: weights or activations.

        Raises:
            SchemeError: see :meth:`check`; or a start of another format, granularity or shape, or where the part takes
                none.
        """
        self.check(quantizer, side)
        if start is not None and not self.takes_start:
            raise SchemeError(
                f"{part_name(self)} begins at {quantizer}'s own parameters and takes no start; leave the solver out."
            )
        quantizer.granularity.check(x.shape)
        if isinstance(start, BlockQTensor):
            what = (start.format.name, str(start.granularity), tuple(start.shape))
            wanted = (quantizer.format.name, str(quantizer.granularity), tuple(x.shape))
            if what != wanted:
                raise SchemeError(f"{part_name(self)} for {wanted} can't start from a tensor of {what}.")
            start = start.params
        return self.begin(quantizer, x.detach(), start, side)

    @abstractmethod
    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:
        """:meth:`make` after all checks."""


class Menu(Learned):
    """Several Learned of one tensor, one of which is in use: what a search over formats or widths sets.

    Args:
        dishes: of one side; the first is in use until :meth:`choose`.
    """

    def __init__(self, dishes: Sequence[Learned]) -> None:
        sides = {dish.side for dish in dishes}
        if len(sides) != 1:
            raise SchemeError(f"a menu has one or more choices, all for one side; got {sorted(sides) or 'none'}.")
        super().__init__(dishes[0].quantizer, dishes[0].side)
        self.dishes = nn.ModuleList(dishes)
        self.index = 0

    @property
    def chosen(self) -> Learned:
        """The one in use."""
        found = self.dishes[self.index]
        assert isinstance(found, Learned)
        return found

    @property
    def quantizer(self) -> Quantizer:  # noqa: D102
        return self.chosen.quantizer

    @property
    def nearest(self) -> bool:  # type: ignore[override]  # noqa: D102
        return self.chosen.nearest

    def removed(self, x: Tensor) -> Tensor | None:  # noqa: D102
        return self.chosen.removed(x)

    def choose(self, index: int) -> None:
        """Use another.

        Raises:
            SchemeError: there is none of that number.
        """
        if not 0 <= index < len(self.dishes):
            raise SchemeError(f"the menu has the choices 0 to {len(self.dishes) - 1}; got {index}.")
        self.index = index

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.chosen.estimate(x)

    def estimate_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.chosen.estimate_in(x, dtype)

    def settle(self, x: Tensor) -> QTensor | QuantParams:  # noqa: D102
        return self.chosen.settle(x)

    def rounded(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.chosen.rounded(x)

    def fixed(self) -> QuantParams | None:  # noqa: D102
        return self.chosen.fixed()

    def penalty(self, t: float | Tensor) -> Tensor:  # noqa: D102
        return self.chosen.penalty(t)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Of all choices: an optimizer made once serves whichever is in use."""
        found: dict[str, list[nn.Parameter]] = {}
        for dish in self.dishes:
            assert isinstance(dish, Learned)
            for name, parameters in dish.groups().items():
                found.setdefault(name, []).extend(parameters)
        return found

    def get_extra_state(self) -> Tensor:
        """The index, for the state dict."""
        return torch.tensor(self.index)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of :meth:`get_extra_state`."""
        self.choose(int(state))


def make_part(name: str, options: Mapping[str, Any]) -> Part:
    """A part by name.

    Raises:
        UsageError: no such part. SchemeError: an unknown option, or a value of the wrong type.
    """
    part: Part = REGISTRY.make(name, options)
    return part


def part_name(part: Part) -> str:
    """Its key in the registry."""
    return REGISTRY.key_of(part)


def _keep_dtype(tensor: Tensor, fn: Any) -> Tensor:
    moved: Tensor = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
