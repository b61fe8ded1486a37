"""Low-bit optimizers: an update rule, times a Quantizer for each state it keeps. One rule a file.

A rule is a class with the names of its states, a frozen dataclass of its options, and a pure function ``update``;
:class:`LowBitOptimizer` does the rest. Between steps a state is codes and scales; for one parameter at a time it is
float32, is updated, and is rounded again. ``from nybble.optim import AdamW`` imports ``adamw.py`` and no other rule.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.core.errors import SchemeError, UsageError, within
from nybble.core.registry import Registry
from nybble.core.seeds import generator
from nybble.core.shapes import Float32
from nybble.optim._embeddings import split_embeddings
from nybble.optim._flat import flatten, unflatten
from nybble.optim._guards import check_range, finite_only, torch_refusals
from nybble.optim._load import matched_groups, restore_entry, unseal
from nybble.optim._states import Kind, StateChoice, check_shape, decode, encode, quantizer, resolve, to_saved
from nybble.rounding import get_rounding

REGISTRY = Registry(
    "nybble.optim", "optimizer", lambda part: isinstance(part, type) and issubclass(part, LowBitOptimizer)
)

__all__ = ["REGISTRY", "LowBitOptimizer", "check_range", "flatten", "split_embeddings", "unflatten"]


def __getattr__(name: str) -> Any:
    """Optimizers by class name: ``AdamW`` is the part ``adamw``."""
    key = name.lower()
    part = REGISTRY.get(key) if key in REGISTRY.names() else None
    if part is None or part.__name__ != name:
        raise AttributeError(f"module 'nybble.optim' has no attribute {name!r}")
    return part


class LowBitOptimizer(torch.optim.Optimizer, ABC):
    """Everything of an optimizer but its update rule.

    Works as torch's do: closures, groups, schedulers, hooks, GradScaler; a parameter without a gradient is left alone.
    Parameters are float32, float16 or bfloat16; the update is float32 and rounded to the parameter's dtype. Where a
    state is quantized, an element whose gradient (or new state) is NaN or infinite keeps its value and its states start
    again from 0, as in bitsandbytes, so that it doesn't take its block along.

    Attributes:
        states: the rule's states and whether one is ``signed`` or ``nonnegative``.
        options_type: frozen dataclass of the rule's options, which checks them; its fields are keys of the groups.
    """

    states: ClassVar[dict[str, Kind]]
    options_type: ClassVar[type[Any]]

    def __init__(
        self, params: ParamsT | nn.Module, options: Mapping[str, Any], *, state: StateChoice, min_size: int, seed: int
    ) -> None:
        defaults = {**options, "state": state, "min_size": min_size, "seed": seed}
        with torch_refusals():
            super().__init__(split_embeddings(params) if isinstance(params, nn.Module) else params, defaults)

    @staticmethod
    @abstractmethod
    def update(
        p: Float32[Tensor, "*shape"],
        grad: Float32[Tensor, "*shape"],
        states: dict[str, Float32[Tensor, " ..."]],
        step: int,
        options: Any,
    ) -> tuple[Float32[Tensor, "*shape"], dict[str, Float32[Tensor, " ..."]]]:
        """One step of one parameter, pure: nothing that comes in is changed.

        Args:
            p: float32, any shape.
            grad: the same.
            states: float32; zeros before the first step.
            step: this one's number, from 1.
            options: an ``options_type``.

        Returns:
            the new parameter and the new states, in memory of their own (not ``grad`` itself).
        """

    def shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """Shape of each state of ``p``: its own, unless a rule keeps less."""
        return {name: tuple(p.shape) for name in self.states}

    # ------------------------------------------------------------------------------------------------------- groups
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have its own options, ``state``, ``min_size`` and ``seed``.

        Raises:
            UsageError: an option out of range, an unknown line, a dtype that isn't served; SchemeError and
                GranularityError: a quantizer that can't keep a state. The group is then not added.
        """
        with torch_refusals():
            super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        self._options(group)
        group["state"] = resolve(group["state"], self.states)
        for i, p in enumerate(group["params"]):
            with within(self._name(index, i)):
                if p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise UsageError(f"float32, float16 and bfloat16 parameters are served; this one is {p.dtype}.")
                shapes = self.shapes(p)
                for name, line in self._lines(group, p).items():
                    if line is not None:
                        check_shape(line, shapes[name])

    def _options(self, group: Mapping[str, Any]) -> Any:
        """The rule's options of a group, checked."""
        check_range("min_size", group["min_size"], whole=True)
        check_range("seed", group["seed"], whole=True)
        for switch in ("maximize", "amsgrad"):
            if group.get(switch):
                raise SchemeError(f"{type(self).__name__} has no {switch}; leave it out, or use torch.optim's.")
        return self.options_type(**{f.name: group[f.name] for f in dataclasses.fields(self.options_type)})

    def _lines(self, group: Mapping[str, Any], p: Tensor) -> dict[str, str | None]:
        """What each state of ``p`` is kept in: a quantizer line, or None for float32."""
        return {
            name: group["state"][name] if math.prod(shape) >= group["min_size"] else None
            for name, shape in self.shapes(p).items()
        }

    def _name(self, group: int, i: int) -> str:
        names = self.param_groups[group].get("param_names")
        return names[i] if names else f"parameter {i} of group {group}"

    # -------------------------------------------------------------------------------------------------------- steps
    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, with gradients.

        Returns:
            the closure's loss.

        Raises:
            UsageError: a sparse gradient, or an option out of range; no parameter has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = [self._options(group) for group in self.param_groups]
        due = [
            (g, i, p)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        for g, i, p in due:
            if p.grad.layout != torch.strided:
                raise UsageError(
                    f"{self._name(g, i)} has a sparse gradient; use a dense one (nn.Embedding(sparse=False)), or "
                    "torch.optim.SparseAdam for it."
                )
        with torch.no_grad():
            for g, i, p in due:
                self._update(g, i, p, options[g])
        return loss

    def _update(self, g: int, i: int, p: Tensor, options: Any) -> None:
        state, lines = self.state[p], self._lines(self.param_groups[g], p)
        step = int(state["step"]) + 1 if state else 1
        old = {
            name: decode(state[name], self.states[name], p.device) if state else p.new_zeros(shape, dtype=torch.float32)
            for name, shape in self.shapes(p).items()
        }
        assert p.grad is not None
        rule = finite_only(self.update) if any(lines.values()) else self.update
        moved, new = rule(p.detach().float(), p.grad.float(), old, step, options)
        p.copy_(moved)
        kept = {name: encode(x, lines[name], self._generator(g, i, name, step, lines[name])) for name, x in new.items()}
        state.update(step=torch.tensor(float(step)), **kept)

    def _generator(self, g: int, i: int, name: str, step: int, line: str | None) -> torch.Generator | None:
        """A stream of its own for each rounding of each state, so that a resumed run draws the same numbers."""
        if line is None or not get_rounding(quantizer(line).rounding).stochastic:
            return None
        group = self.param_groups[g]
        return generator(group["seed"], "optim", f"{g}.{i}", name, str(step), device=group["params"][i].device)

    # -------------------------------------------------------------------------------------------- saving and loading
    def state_bytes(self) -> dict[str, int]:
        """Bytes held now, by state: codes, scales and what else a state needs; ``step`` is 4 bytes a parameter."""
        total = dict.fromkeys((*self.states, "step"), 0)
        for state in self.state.values():
            for name, kept in state.items():
                total[name] += kept.numel() * kept.element_size() if isinstance(kept, Tensor) else kept.nbytes()
        return total

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a quantized state is a dict of its tensors (``codes`` uint8, ``scale`` ...) and what they mean.

        Tensors, strings and numbers only: ``torch.load(weights_only=True)`` reads it; :func:`flatten` makes it fit for
        safetensors. With ``state=None`` it is what ``torch.optim`` writes and reads.
        """
        saved: dict[str, Any] = super().state_dict()
        for group in saved["param_groups"]:
            for index in group["params"]:
                if index in saved["state"]:
                    entry = saved["state"][index].items()
                    saved["state"][index] = {name: to_saved(x, group["state"].get(name)) for name, x in entry}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Continue from :meth:`state_dict`, on the parameters' devices: codes stay codes, float32 stays float32.

        Args:
            state_dict: this optimizer's, or its torch twin's. Options of its groups replace those here, as in torch;
                ``state`` and ``min_size`` are kept.
            convert: decode states that were saved in another quantizer (or in float32) and round them anew; otherwise
                they are refused.

        Raises:
            SchemeError: a state was saved in another quantizer. UsageError, FileError: other parameters, or not such a
                state dict. Nothing has changed then.
        """
        before = self.register_load_state_dict_pre_hook(lambda _, saved: self._restored(saved, convert))
        after = self.register_load_state_dict_post_hook(unseal, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restored(self, saved: dict[str, Any], convert: bool) -> dict[str, Any]:
        groups, states = [], {}
        for g, (own, theirs) in enumerate(matched_groups(self.param_groups, saved)):
            ours = {key: own[key] for key in ("state", "min_size")}
            groups.append({**{key: value for key, value in own.items() if key != "params"}, **theirs, **ours})
            self._options(groups[-1])
            for i, (index, p) in enumerate(zip(theirs["params"], own["params"], strict=True)):
                lines = self._lines(own, p)

                def draw(name: str, g: int = g, i: int = i, lines: dict[str, str | None] = lines) -> Any:
                    return self._generator(g, i, name, 0, lines[name])

                if saved["state"].get(index):
                    place, entry, shapes = self._name(g, i), saved["state"][index], self.shapes(p)
                    states[index] = restore_entry(
                        place, entry, shapes, lines, self.states, p.device, draw if convert else None
                    )
        return {"state": states, "param_groups": groups}
