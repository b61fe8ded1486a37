"""A block while it is worked on: its module, one float32 truth of each weight, and what stands in for its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.nn.kinds import Quantized, Target
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer

PATHS = ("float", "quantized")
Part = nn.Module | nn.Parameter | None


@dataclass(kw_only=True)
class Record:
    """What became of one weight so far; the report's row is made of it and of the layer that is really there.

    Attributes:
        target: what it is of. number: which of the target's matrices.
        quantizer: what the weight was rounded to; None where it stays in float.
        stored: what the weight is where no Quantizer can say it, in a line.
        error: relative output error (of the weight itself without calibration). rtn_error: round-to-nearest's.
        clip: see :class:`nybble.solvers.Solved`. notes: fallbacks and what later steps did.
        inputs: the quantizer that the input gets, with its parameters where they are static.
        sample: some of the inputs as they came, [tokens, columns].
        changed: a later step changed the weight or the bias, so that error and rtn_error are measured anew.
        learned: what reconstructions did, in JSON's types (:class:`nybble.report.record.LayerRow`).
    """

    target: Target
    number: int = 0
    quantizer: Quantizer | None = None
    stored: str = ""
    error: float | None = None
    rtn_error: float | None = None
    clip: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    inputs: tuple[Quantizer | None, QuantParams | None] = (None, None)
    sample: Tensor | None = None
    changed: bool = False
    learned: dict[str, Any] | None = None


class BlockState:
    """One block of a model on its way from float to quantized.

    A weight's truth is float32 (or what the file has, where that is as precise), read with :meth:`get` and changed with
    :meth:`put` alone; the module holds a cast of it for forwards. What a step puts in a layer's place is installed
    (:meth:`install`), and :meth:`on` brings the float layers back for as long as the float network has to run.

    Args:
        module: with real weights, in the dtype of forwards.
        name: its full name; empty for the model itself.
        precise: parameters as the source has them, by name relative to the block; those that the module holds exactly
            may be missing. In their own precision, on the module's device.
        targets: what is quantized of it, names relative to it.

    Attributes:
        lends: gives, by name in the module, tensors that stand for its parameters on the quantized path, anew for every
            forward, with gradients: what a learned transform makes of them.
        within: name of the module in the block that a view (:meth:`narrowed`) is about; empty for all of it.
        records: by a target's name. beside: what :meth:`stand_in` put in place, by name.
        folded: full names of BatchNorms that went into convolutions, by convolution.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        precise: Mapping[str, Tensor] | None = None,
        targets: Sequence[Target] = (),
    ) -> None:
        self.module, self.name, self.targets = module, name, targets
        self.records: dict[str, Record] = {}
        self.folded: dict[str, str] = {}
        self.beside: dict[str, nn.Module] = {}
        self._precise: dict[str, Tensor] = {}
        self._marks: dict[str, tuple[int, int]] = {}
        self._float: dict[str, Part] = {}
        self._installed: dict[str, Part] = {}
        self._packed: dict[str, nn.Module] = {}
        self._came: dict[str, Tensor] = {}
        self.within = ""
        self.lends: Callable[[], Mapping[str, Tensor]] | None = None
        for key, tensor in (precise or {}).items():
            live = self._live(key)
            if live is not None and live.data_ptr() != tensor.data_ptr():
                self._keep(key, tensor)

    @property
    def prefix(self) -> str:
        """What full names of its parts begin with."""
        return f"{self.name}." if self.name else ""

    def narrowed(self, within: str, targets: Sequence[Target]) -> BlockState:
        """The same block, of which a module and the targets in it alone are to be worked on: what is done is shared."""
        view = copy.copy(self)
        view.within, view.targets = within, targets
        return view

    # ------------------------------------------------------------------------------------------------ weights
    def get(self, name: str) -> Tensor:
        """A parameter or buffer (``mlp.up_proj.weight``) in float32, on the block's device; not to be written to.

        Raises:
            ModelError: there is none. RuntimeError: something else than :meth:`put` wrote to the module's copy.
        """
        return self.raw(name).float()

    def raw(self, name: str) -> Tensor:
        """As :meth:`get`, in the precision that is kept: no float32 copy of a large tensor is made."""
        live = self._live(name)
        if live is None:
            raise ModelError(f"{self.prefix}{name} is no tensor of this model.")
        if name not in self._precise:
            return live.detach()
        truth = self._precise[name].to(live.device)
        if self._marks[name] != _mark(live):
            if not _is_cast(live, truth):
                raise RuntimeError(
                    f"{self.prefix}{name} was written to without BlockState.put: its truth is out of date."
                )
            self._marks[name] = _mark(live)  # some routers cast their weights whenever they run
        return truth

    def matrix(self, target: Target) -> Tensor:
        """A target's matrix [out, in] (of a fused one [matrices, out, in]), in the precision that is kept."""
        module = self.float_module(target.module)
        return target.kind.matrix(module, target.leaf, lambda name: self.raw(f"{target.module}.{name}"))

    def float_module(self, name: str) -> nn.Module:
        """The float module called ``name``, also where something stands in for it."""
        found = self._float.get(name)
        return found if isinstance(found, nn.Module) else self.module.get_submodule(name)

    def has(self, name: str) -> bool:
        """Whether there is such a parameter or buffer."""
        return self._live(name) is not None

    def put(self, name: str, value: Tensor) -> None:
        """Change a parameter: its truth, and the cast of it that forwards read; a bias that was None is made.

        Args:
            name: as for :meth:`get`.
            value: float32, of the parameter's shape.
        """
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        live = self._live(name)
        dtype = next(module.parameters()).dtype if live is None else live.dtype
        cast = value.to(dtype).contiguous()
        if isinstance(live, nn.Parameter):
            live.data = cast
        else:
            setattr(module, leaf, nn.Parameter(cast, requires_grad=False))
        self._keep(name, value.contiguous())

    def fold(self, name: str, value: Tensor) -> None:
        """As :meth:`put`, of a rewrite that was learned: the float block computes the same, but for rounding.

        What goes from block to block in the float network must not depend on it: :meth:`as_it_came`.
        """
        live = self._live(name)
        if live is not None:
            self._came.setdefault(name, live.data)
        self.put(name, value)

    @contextmanager
    def as_it_came(self) -> Iterator[None]:
        """With the parameters of forwards that were there before anything was folded."""
        now: dict[str, Tensor] = {}
        try:
            for name, tensor in self._came.items():
                live = self._live(name)
                assert live is not None
                now[name], live.data = live.data, tensor
            yield
        finally:
            for name, tensor in now.items():
                live = self._live(name)
                assert live is not None
                live.data = tensor

    def truth(self) -> dict[str, Tensor]:
        """Every tensor of the float block's state by name, in the precision that is kept."""
        with self.on("float") as module:
            return {name: self._precise.get(name, tensor) for name, tensor in module.state_dict().items()}

    def _live(self, name: str) -> Tensor | None:
        owner, _, leaf = name.rpartition(".")
        place = next((p for p in self._float if name == p or name.startswith(f"{p}.")), None)
        if place is not None:  # a stand-in is there now
            was = self._float[place]
            if not isinstance(was, nn.Module):
                return was if name == place else None
            inside = name.removeprefix(f"{place}.").rpartition(".")
            found = getattr(was.get_submodule(inside[0]), inside[2], None)
            return found if isinstance(found, Tensor) else None
        try:
            found = getattr(self.module.get_submodule(owner), leaf, None)
        except AttributeError:
            return None
        return found if isinstance(found, Tensor) else None

    def _keep(self, name: str, tensor: Tensor) -> None:
        live = self._live(name)
        assert live is not None
        self._precise[name], self._marks[name] = tensor, _mark(live)

    # ------------------------------------------------------------------------------------------------ layers
    def install(self, target: Target, made: Quantized) -> nn.Module:
        """Let the quantized module of a target stand where the float one does; returns it."""
        place = _place(target)
        if place in self._installed:
            _exchange(self.module, place, self._float[place])
        return self.adopt(target, lambda root: target.kind.put(root, target, made))

    def replace(self, target: Target, part: nn.Module) -> None:
        """Let ``part``, a trainable twin say, stand at a target's place."""
        place = _place(target)
        before = _at(self.module, place)
        self._float.setdefault(place, before)
        if isinstance(before, nn.Module) and place in self._installed:
            self._packed.setdefault(place, before)
        _exchange(self.module, place, part)
        self._installed[place] = part

    def stand_in(self, name: str, part: nn.Module | None) -> None:
        """Let ``part`` stand for a module that is no target, on the quantized path alone; None: itself again."""
        self._float.setdefault(name, _at(self.module, name))
        if part is None:
            _exchange(self.module, name, self._float.pop(name))
            del self._installed[name], self.beside[name]
            return
        _exchange(self.module, name, part)
        self._installed[name] = self.beside[name] = part

    def packed(self) -> dict[str, nn.Module]:
        """By place, the quantized modules: what stands in, or what a trainable twin began from."""
        modules = {place: part for place, part in self._installed.items() if isinstance(part, nn.Module)}
        modules = {place: part for place, part in modules.items() if place not in self.beside}
        return {place: self._packed.get(place, part) for place, part in modules.items()}

    def place(self, target: Target) -> str:
        """Where a target's quantized module is."""
        return _place(target)

    def adopt(self, target: Target, restore: Callable[[nn.Module], None]) -> nn.Module:
        """Let ``restore`` put a target's quantized module in place; returns it."""
        place = _place(target)
        before = _at(self.module, place)
        restore(self.module)
        self._float.setdefault(place, before)
        found = self._installed[place] = _at(self.module, place)
        assert isinstance(found, nn.Module)
        return found

    def learn_truth(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, of which the module holds casts, for the truth."""
        for name, tensor in tensors.items():
            live = self._live(name)
            if live is not None and live.dtype != tensor.dtype:
                self._keep(name, tensor)

    def installed(self, target: Target) -> nn.Module | None:
        """What stands in for a target."""
        found = self._installed.get(_place(target))
        return found if isinstance(found, nn.Module) else None

    @contextmanager
    def on(self, path: str) -> Iterator[nn.Module]:
        """The module as it is on a path: ``float``, or ``quantized`` with everything that was installed and is lent."""
        if path != "float":
            with _lent(self.module, {} if self.lends is None else self.lends()):
                yield self.module
            return
        for name, part in self._float.items():
            _exchange(self.module, name, part)
        try:
            yield self.module
        finally:
            for name, part in self._installed.items():
                _exchange(self.module, name, part)

    def settle(self) -> None:
        """Forget the float layers and the truth: what stands in is what is left."""
        self._float, self._installed, self._packed, self._precise, self._marks = {}, {}, {}, {}, {}
        self._came, self.lends, self.beside = {}, None, {}


@contextmanager
def _lent(root: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """With tensors, which are no parameters, in the place of parameters."""
    before = {}
    try:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            parameters: dict[str, Any] = root.get_submodule(owner)._parameters
            before[name] = parameters, leaf, parameters[leaf]
            parameters[leaf] = tensor
        yield
    finally:
        for parameters, leaf, parameter in before.values():
            parameters[leaf] = parameter


def _is_cast(live: Tensor, truth: Tensor) -> bool:
    """Whether a tensor is another in its own dtype, or was cast to it by way of 16 bits."""
    through = (live.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(truth.to(dtype).to(live.dtype), live) for dtype in through)


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is written to or replaced."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _place(target: Target) -> str:
    """Where a target's quantized module is: the name of a module, a fused parameter, or a part of an attention."""
    return f"{target.name}.{target.kind.part}" if target.kind.part else target.name


def _at(root: nn.Module, name: str) -> Part:
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    found = module._modules.get(leaf)
    return module._parameters.get(leaf) if found is None else found


def _exchange(root: nn.Module, name: str, part: Part) -> Part:
    """Put a module, a parameter or nothing at ``name``; returns what was there. Modules keep their order."""
    owner, _, leaf = name.rpartition(".")
    module, before = root.get_submodule(owner), _at(root, name)
    if isinstance(part, nn.Module):
        module._parameters.pop(leaf, None)
        module._modules[leaf] = part
    else:
        module._modules.pop(leaf, None)
        if part is not None:
            module._parameters[leaf] = part
    return before
