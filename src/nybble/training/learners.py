"""A quantized network whose scales, norms and biases can learn: put in place, and settled again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble.calibration.trace import replace_forward
from nybble.core.curve import short
from nybble.learned import Learned
from nybble.learned._of_packed import learn_scales
from nybble.learned.frozen_codes import Exponents
from nybble.nn.layer import QuantLayer
from nybble.nn.learned_norm import LearnedNorm, is_norm
from nybble.nn.packed import Packed
from nybble.nn.swap import set_module
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

_OCTAVES = 10.0
"""Of a logarithm, what is moved by at a rate of 1."""


class LearningScales(Packed):
    """A packed weight whose scales learn; its values are those that would be stored, at every step.

    Args:
        base: stays as it is.
        learned: of its scales.

    Attributes:
        began: what the base holds.
    """

    def __init__(self, base: Packed, learned: Learned) -> None:
        began = base.qtensor()
        super().__init__(began, base.dtype)
        self.learned = learned
        self.began = began
        known = set() if base.dtype is None else {base.dtype}
        self._asked, self._used = {True: known, False: known}, set[torch.dtype]()
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, with gradients to its scales, or to what :meth:`make` made."""
        self._used.add(dtype)
        made = self._made.get(dtype)
        return self._weight(dtype) if made is None else made[1]

    def make(self) -> None:
        """Make the weight once for all forwards until :meth:`let_go`: where gradients are wanted, as leaves."""
        learns, self._used = torch.is_grad_enabled(), set()
        for dtype in self._asked[learns]:
            weight = self._weight(dtype)
            self._made[dtype] = weight, weight.detach().requires_grad_(learns)

    def let_go(self) -> None:
        """What came to the leaves goes on to the scales."""
        for weight, leaf in self._made.values():
            if leaf.grad is not None:
                weight.backward(leaf.grad)  # type: ignore[no-untyped-call]
        if self._used:  # the next time in these: a product's precision may be another than the model's
            self._asked[torch.is_grad_enabled()] = self._used
        self._made = {}

    def forget(self) -> None:
        """Let go of it without that."""
        self._made = {}

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return self.learned.estimate(self._shape_alone()).to(dtype)

    def _shape_alone(self) -> Tensor:
        """Zeros of the weight's shape: nothing but codes and scales is held."""
        return torch.zeros((), dtype=torch.float32, device=self.device).expand(self.shape)

    def settled(self) -> Packed:
        """What is stored: codes as they were."""
        made = self.learned.settle(self._shape_alone())
        assert isinstance(made, QTensor)
        return Packed(made, self.dtype)


class Learners:
    """What learns in a network, by kind; the network has it in place until :meth:`settle`.

    Args:
        model: quantized.
        weights: see :class:`nybble.training.steps.Student`.
        what: of ``scales``, ``norms`` and ``biases``.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Sequence[Quantizer]], what: Sequence[str]) -> None:
        self._model = model
        self._packed: dict[str, Packed] = {}
        self.scales: dict[str, LearningScales] = {}
        self.norms: dict[str, LearnedNorm] = {}
        self._was: dict[str, nn.Module] = {}
        self._biases: dict[str, tuple[QuantLayer, nn.Parameter]] = {}
        self._asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if "scales" in what:
            for name, known in weights.items():
                packed = model.get_submodule(name)
                assert isinstance(packed, Packed)
                learned = learn_scales(packed.qtensor(), known)
                if learned is not None:
                    self._packed[name], self.scales[name] = packed, LearningScales(packed, learned)
                    set_module(model, name, self.scales[name])
        if "norms" in what:
            for name, module in list(model.named_modules()):
                if name and is_norm(module):
                    self._was[name], self.norms[name] = module, LearnedNorm(module)
                    set_module(model, name, self.norms[name])
        if "biases" in what:
            for name, module in model.named_modules():
                if isinstance(module, QuantLayer) and module.bias is not None:
                    self._biases[name] = module, module.bias
                    module.bias = nn.Parameter(module.bias.detach().float().clone())
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind."""
        found = {
            "scales": [p for weight in self.scales.values() for ps in weight.learned.groups().values() for p in ps],
            "norms": [p for norm in self.norms.values() for p in norm.parameters()],
            "biases": [layer.bias for layer, _ in self._biases.values() if layer.bias is not None],
        }
        return {name: parameters for name, parameters in found.items() if parameters}

    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return [parameter for parameters in self.groups().values() for parameter in parameters]

    def dense_bytes(self) -> int:
        """Of all dense weights, with a gradient to each."""
        sizes = [w.shape.numel() * (w.dtype or torch.float32).itemsize for w in self.scales.values()]
        return 2 * sum(sizes)

    @contextmanager
    def made(self) -> Iterator[None]:
        """Inside, dense weights are made once, and gradients add up in them; behind it they have gone to the scales."""
        try:
            for weight in self.scales.values():
                weight.make()
            yield
            for weight in self.scales.values():
                weight.let_go()
        finally:
            for weight in self.scales.values():
                weight.forget()

    def settle(self) -> dict[str, tuple[float, float, float]]:
        """Put what was learned in place, as it is stored; ratios of scales, by weight."""
        ratios = {}
        for name, learning in self.scales.items():
            before = self._packed[name].qtensor().dequantize()
            settled = learning.settled()
            ratios[name] = _ratios(before, settled.qtensor().dequantize())
            set_module(self._model, name, settled)
        for name, norm in self.norms.items():
            set_module(self._model, name, norm.settle().train(self._was[name].training))
        for layer, was in self._biases.values():
            assert layer.bias is not None
            layer.bias = nn.Parameter(layer.bias.detach().to(was.dtype), requires_grad=False)
        self._ask_as_before()
        return ratios

    def undo(self) -> None:
        """Put back what was there."""
        for name, module in (self._packed | self._was).items():
            set_module(self._model, name, module)
        for layer, was in self._biases.values():
            layer.bias = was
        self._ask_as_before()

    def _ask_as_before(self) -> None:
        """Gradients for the caller's parameters, where they wanted any."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._asked[name])


def unit_of(parameter: nn.Parameter, relative: bool) -> float:
    """What a rate of 1 means for something learned: of logarithms octaves; its mean magnitude, or a number."""
    if isinstance(parameter, Exponents):
        return _OCTAVES
    return (float(parameter.detach().abs().mean()) or 1.0) if relative else 1.0


def _ratios(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Smallest, median and largest ratio of values: of scales where there is no offset."""
    real = before != 0
    if not bool(real.any()):
        return 1.0, 1.0, 1.0
    ratio = after[real] / before[real]
    low, middle, high = (short(float(value)) for value in (ratio.min(), ratio.median(), ratio.max()))
    return low, middle, high


@contextmanager
def checkpointed(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let only what goes from block to block be kept for the backward pass; blocks are run again when it comes.

    A block's dense weights, float32 and made anew from codes, are then there for one block at a time.
    """
    with ExitStack() as undo:
        for name in blocks:
            block = model.get_submodule(name)
            replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False), undo)
        yield
