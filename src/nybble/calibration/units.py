"""The parts of a block that can be learned one after the other: its residual blocks and layers, found by running it.

A reconstruction by units (AdaRound by layers, BRECQ and FlexRound by residual blocks; Li et al. 2021, arXiv:2102.05426)
needs modules with one input and one output. Which modules of a convolutional network are its residual blocks no list
says; what data flows does. Between two operators a network is *cut* where one tensor carries all that the rest reads.
In a chain of layers that is nearly everywhere, beside a skip connection nowhere. A stretch without a cut that holds
layers and lies in no child of a module is the module's own doing: the module is a residual block (or one with branches,
or a squeeze). Modules of its class are units too, with a skip or without. What is in none of them goes layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nybble.models.adapter import under


@dataclass(frozen=True)
class Unit:
    """A module of a block.

    Attributes:
        name: relative to the block.
        layers: names, as they were given, of the layers in it.
        follows: it is called with what the unit before it gave, as it is, and with nothing else.
        writes: it writes to what it is called with.
    """

    name: str
    layers: tuple[str, ...]
    follows: bool = False
    writes: bool = False


@dataclass
class _Call:
    """One module's: operators ``start .. stop``, the tensor that it is called with, and the one that it gives."""

    start: int
    given: tuple[Any, ...] | None
    alone: bool
    stop: int = -1
    gives: tuple[Any, ...] | None = None
    again: bool = False
    writes: bool = False

    @property
    def fits(self) -> bool:
        """One call, with a tensor first, that gives one tensor; samples in front of both."""
        return not self.again and self.given is not None and self.gives is not None


@torch.no_grad()
def find_units(
    block: nn.Module,
    layers: Mapping[str, str],
    run: Callable[[], object],
    inputs: Iterable[Tensor],
    by: str,
    classes: Collection[str] = (),
) -> list[Unit]:
    """Cut a block into units.

    Args:
        block: float, in eval mode.
        layers: what every layer that is to be in a unit is called, and the name of its module in the block.
        run: calls the block, or the model that it is in, once.
        inputs: the tensors that this call begins with, samples in front.
        by: ``layer``: every layer is in a unit of its own, together with what else a module holds that holds no other
            layer (an activation, say). ``block``: see the module.
        classes: names of classes whose modules are units by ``block`` as well: where something else (a timestep's
            embedding, the skips of a U-Net) is read all along, data flow alone has no cuts.

    Returns:
        In the order of their calls. Empty where the block can't be cut: a layer is called twice, or in no module with
        one tensor in front and one behind, both with the samples in front.
    """
    flow = _Flow(block, inputs)
    flow.watch(run)
    found = _Finder(block, layers, flow, classes)
    names = found.by_layer() if by == "layer" else found.by_block()
    if not names:
        return []
    names.sort(key=lambda name: flow.calls[name].start)
    units: list[Unit] = []
    for i, name in enumerate(names):
        before = flow.calls[names[i - 1]].gives if i else None
        call = flow.calls[name]
        follows = call.alone and before is not None and before == call.given
        units.append(Unit(name, found.inside(name), follows, call.writes))
    return units


class _Finder:
    def __init__(self, block: nn.Module, layers: Mapping[str, str], flow: _Flow, classes: Collection[str]) -> None:
        self.classes = classes
        self.block, self.layers, self.flow, self.calls = block, layers, flow, flow.calls
        self.mixing: set[type[nn.Module]] = set()

    def inside(self, name: str) -> tuple[str, ...]:
        """Layers in a module."""
        return tuple(key for key, module in self.layers.items() if module == name or module.startswith(under(name)))

    def children(self, name: str) -> list[str]:
        """Called modules in a module that are in no other called one there."""
        own = [other for other in self.calls if other != name and other.startswith(under(name))]
        return [other for other in own if not any(other.startswith(under(o)) for o in own if o != other)]

    def mixes(self, name: str) -> bool:
        """Whether a module does more with its layers than call them, or modules that hold them, one by one."""
        call = self.calls[name]
        within = [c for c in map(self.calls.__getitem__, self.children(name)) if not c.again]
        held = [self.calls[self.layers[key]] for key in self.inside(name) if self.layers[key] in self.calls]
        own = [(start, stop) for start, stop in self.flow.stretches if call.start <= start and stop <= call.stop]
        own = [(start, stop) for start, stop in own if not any(c.start <= start and stop <= c.stop for c in within)]
        mixed = any(start <= c.start and c.stop <= stop for start, stop in own for c in held)
        return mixed and name not in self.layers.values()

    def by_block(self) -> list[str]:
        self.mixing = {type(self.block.get_submodule(name)) for name in self.calls if name and self.mixes(name)}
        self.mixing |= {type(part) for part in self.block.modules() if type(part).__name__ in self.classes}
        return self._covering(self._in(""))

    def _in(self, name: str) -> list[str]:
        inside = self.inside(name)
        if not inside:
            return []
        whole = len(inside) == 1 or type(self.block.get_submodule(name)) in self.mixing
        if name and whole and self.calls[name].fits:
            return [name]
        return [unit for child in self.children(name) for unit in self._in(child)]

    def by_layer(self) -> list[str]:
        return self._covering([self._grown(module) for module in self.layers.values() if self._fits(module)])

    def _fits(self, name: str) -> bool:
        return bool(name) and name in self.calls and self.calls[name].fits

    def _grown(self, name: str) -> str:
        """The largest module around a layer that holds no other."""
        found, inside = name, self.inside(name)
        for parent in _parents(name):
            if self._fits(parent) and self.inside(parent) == inside:
                found = parent
        return found

    def _covering(self, names: Sequence[str]) -> list[str]:
        """With units for the layers that are in none, and no unit in another; empty if that can't be."""
        found = list(dict.fromkeys(names))
        for module in self.layers.values():
            if not any(module == name or module.startswith(under(name)) for name in found):
                around = next((parent for parent in (module, *_parents(module)) if self._fits(parent)), "")
                if not around:
                    return []
                found.append(around)
        return [name for name in found if not any(name.startswith(under(other)) for other in found)]


def _parents(name: str) -> list[str]:
    """Names of the modules around one, the nearest first; without the block's own."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


@dataclass
class _Value:
    """What a piece of memory held from one operator that wrote to it to the next: when made, when read last."""

    made: int
    read: int = field(default=-1)


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which operators read what depends on the inputs, and when modules are called meanwhile.

    Views share their memory, so they are one value: cuts that this hides are no loss.
    """

    def __init__(self, block: nn.Module, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        inputs = list(inputs)
        self.block, self.clock, self.samples = block, 0, len(inputs[0])
        self.values: list[_Value] = []
        self.now: dict[int, int] = {}
        self.calls: dict[str, _Call] = {}
        self.alive: list[object] = []  # so that no other tensor gets the memory of one that was seen
        for tensor in inputs:
            self._new(tensor)

    def watch(self, run: Callable[[], object]) -> None:
        """Run, and see."""
        handles = []
        for name, module in self.block.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            with self:
                result = run()
        finally:
            for handle in handles:
                handle.remove()
        self.clock += 1
        self._read(result)
        self.alive.clear()

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Operators between one cut and the next."""
        changes = [0] * (self.clock + 1)
        for value in self.values:
            if value.read > value.made:  # there, from behind the operator that made it up to the last that reads it
                changes[value.made] += 1
                changes[value.read] -= 1
        there, cuts = 0, [0]
        for time, change in enumerate(changes[: self.clock]):
            there += change
            if there == 1 and time:
                cuts.append(time)
        return list(zip(cuts, [*cuts[1:], self.clock], strict=True))

    def _new(self, tensor: Tensor) -> None:
        self.now[_memory(tensor)] = len(self.values)
        self.values.append(_Value(self.clock))
        self.alive.append(tensor)

    def _read(self, what: object) -> bool:
        found = [self.now[_memory(t)] for t in tree_leaves(what) if isinstance(t, Tensor) and _memory(t) in self.now]
        for number in found:
            self.values[number].read = self.clock
        return bool(found)

    def _mark(self, tensor: object) -> tuple[Any, ...] | None:
        """Tells a tensor of all samples that depends on the inputs, as it is now, from all others."""
        if not isinstance(tensor, Tensor) or _memory(tensor) not in self.now:
            return None
        if not tensor.dim() or len(tensor) != self.samples:
            return None
        return self.now[_memory(tensor)], tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.calls:
                self.calls[name].again = True
                return
            others = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
            self.calls[name] = _Call(self.clock, self._mark(args[0]) if args else None, not others)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            call = self.calls[name]
            if call.stop < 0:
                call.stop, call.gives = self.clock, self._mark(output)
                call.writes = call.given is not None and self._mark(args[0]) != call.given

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.clock += 1
        self.alive.extend(t for t in tree_leaves(found) if isinstance(t, Tensor))
        if self._read((args, kwargs)):
            for tensor in tree_leaves(_written(func._schema.arguments, args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._new(tensor)
            for tensor in tree_leaves(found):
                if isinstance(tensor, Tensor) and _memory(tensor) not in self.now:
                    self._new(tensor)
        return found


def _written(arguments: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operator writes to, of what it is called with."""
    given = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(arguments)]
    return [value for a, value in zip(arguments, given, strict=True) if a.alias_info and a.alias_info.is_write]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
