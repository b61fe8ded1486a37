"""Low-bit optimizers: an update rule, times a Quantizer for each state it keeps. One rule a file.

A rule is a class with the names of its states, a frozen dataclass of its options, and a pure function ``update``;
:class:`LowBitOptimizer` does the rest. Between steps a state is codes and scales; for one parameter at a time it is
float32, is updated, and is rounded again. ``from nybble.optim import AdamW`` imports ``adamw.py`` and no other rule.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, ClassVar, Unpack, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nybble.core.errors import SchemeError, UsageError, within
from nybble.core.registry import Registry
from nybble.core.seeds import generator
from nybble.core.shapes import Float32
from nybble.optim._common import Common, WholeSignature, translate
from nybble.optim._embeddings import is_wide, split_embeddings
from nybble.optim._flat import flatten, unflatten
from nybble.optim._fused import Fused, find_kernel
from nybble.optim._guards import NonFiniteWarning, check_range, finite_only, torch_refusals
from nybble.optim._load import check_is_saved, matched_groups, restore_entry, restore_residual, unseal
from nybble.optim._paged import Copies, copies_for, in_turn, is_paged
from nybble.optim._presets import PAGED, SUFFIXES, paged, rule_and_suffix
from nybble.optim._sharded import gathered, is_cut, local, local_gradient, span, spread
from nybble.optim._states import (
    Kind,
    StateChoice,
    check_keeps_sign,
    check_shape,
    count_of,
    decode,
    encode,
    line_for,
    quantizer,
    resolve,
    to_saved,
)
from nybble.optim._weights import check_fits, check_weights, join24, split24, stochastic_bfloat16
from nybble.rounding import get_rounding

REGISTRY = Registry(
    "nybble.optim", "optimizer", lambda part: isinstance(part, type) and issubclass(part, LowBitOptimizer)
)

__all__ = [
    "REGISTRY",
    "LowBitOptimizer",
    "NonFiniteWarning",
    "check_range",
    "flatten",
    "preset_names",
    "split_embeddings",
    "unflatten",
]


def __getattr__(name: str) -> Any:
    """Optimizers by class name: ``AdamW`` is the part ``adamw``, ``AdamW8bit`` that with the states of ``state8``.

    ``PagedAdamW8bit`` is ``AdamW8bit`` whose states are paged.
    """
    plain = name.removeprefix(PAGED)
    rule, suffix = rule_and_suffix(plain)
    key = rule.lower()
    part = REGISTRY.get(key) if key in REGISTRY.names() else None
    if part is None or part.__name__ != rule:
        raise AttributeError(f"module 'nybble.optim' has no attribute {name!r}")
    if suffix:
        made = globals().get(plain) or SUFFIXES[suffix].applied(part, plain)
        globals()[plain] = part = made
    if name != plain:
        globals()[name] = part = paged(part, name)
    return part


def preset_names() -> list[str]:
    """Every optimizer with the states of a preset: ``AdamW8bit``, ``AdamW4bit``, ``PagedAdamWFp8`` ..."""
    plain = [part.__name__ + suffix for part in REGISTRY.all().values() for suffix in SUFFIXES]
    return sorted((*plain, *(PAGED + name for name in plain)))


def _check_dtype(p: Tensor) -> None:
    """Raise UsageError for a parameter of another dtype than those that are served."""
    if p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"float32, float16 and bfloat16 parameters are served; this one is {p.dtype}.")


class LowBitOptimizer(torch.optim.Optimizer, ABC):
    """Everything of an optimizer but its update rule.

    Works as torch's do: closures, groups, schedulers, hooks, GradScaler; a parameter without a gradient is left alone.
    Parameters are float32, float16 or bfloat16; the update is float32 and rounded to the parameter's dtype. Where a
    state is quantized, an element whose gradient (or new state) is NaN or infinite keeps its value and its states start
    again from 0, as in bitsandbytes, so that it doesn't take its block along; and with factored states not its row.

    Args:
        params: parameters, named parameters or groups, as torch takes them; or a module, whose embeddings then keep
            32-bit states (:func:`~nybble.optim.split_embeddings`).
        options: the rule's.
        common: :class:`~nybble.optim._common.Common`: ``state``, ``min_size``, ``seed``, ``weights``, ``keep_sign``,
            ``is_paged``, and what torch, bitsandbytes and torchao call these.

    Attributes:
        states: the rule's states and whether one is ``signed`` or ``nonnegative``; all that it may ever keep.
        factors: those of them that are small; one line for all states leaves them in float32.
        options_type: frozen dataclass of the rule's options, which checks them; its fields are keys of the groups.
        elementwise: whether an element's step looks at no other element; the rule then serves shards of parameters.
        counts: whether the twin's state dicts have the number of steps; ours always do.
        default_state: where none is said; presets have others.
        default_min_size: where none is said.
        default_is_paged: where nothing is said.
        bits: that a preset's name says; None for rules.
    """

    states: ClassVar[dict[str, Kind]]
    factors: ClassVar[tuple[str, ...]] = ()
    options_type: ClassVar[type[Any]]
    elementwise: ClassVar[bool] = True
    counts: ClassVar[bool] = True
    default_state: ClassVar[StateChoice] = "state8"
    default_min_size: ClassVar[int] = 4096
    default_is_paged: ClassVar[bool] = False
    bits: ClassVar[int | None] = None

    __signature__ = WholeSignature()

    def __init__(self, params: ParamsT | nn.Module, options: Mapping[str, Any], **common: Unpack[Common]) -> None:
        defaults = {**options, **translate(common, self._own(), self.bits, type(self).__name__)}
        self._fused_off = common.get("fused") is False
        with torch_refusals():
            super().__init__(split_embeddings(params) if isinstance(params, nn.Module) else params, defaults)

    @classmethod
    def _own(cls) -> dict[str, Any]:
        """The common arguments by our names, and their defaults."""
        kept = {"state": cls.default_state, "min_size": cls.default_min_size, "seed": 0}
        return {**kept, "weights": "nearest", "keep_sign": False, "is_paged": cls.default_is_paged}

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

    def shapes(self, p: Tensor, options: Any = None) -> dict[str, tuple[int, ...]]:
        """Shape of each state that is kept of ``p``: its own, unless a rule keeps less or fewer.

        Args:
            p: the parameter.
            options: of its group; by default the optimizer's.
        """
        return {name: tuple(p.shape) for name in self.states}

    @staticmethod
    def refusal(p: Tensor) -> str | None:
        """Why the rule can't serve a parameter of this shape, with a way out; None where it can."""
        return None

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
        options = self._options(group)
        for i, p in enumerate(group["params"]):
            with within(self._name(index, i)):
                _check_dtype(p)
                check_fits(group["weights"], p.dtype)
                if (why := self.refusal(p)) is not None:
                    raise UsageError(f"{type(self).__name__}: {why}")
                if not self.elementwise and is_cut(p):
                    raise UsageError(
                        f"{type(self).__name__} looks at whole tensors, and this one is sharded ({span(p)}). Use a "
                        "rule of single elements (AdamW, Adam, Lion, SGD, RMSprop, Adagrad), or leave it replicated."
                    )
                self._check_lines(group, p, options)

    def _check_lines(self, group: dict[str, Any], p: Tensor, options: Any) -> None:
        """Raise GranularityError where a state of this shape can't be cut as its line asks."""
        shapes = self.shapes(local(p), options)
        for name, line in self._lines(group, p, options).items():
            if line is not None:
                check_shape(line, shapes[name])

    def _options(self, group: dict[str, Any]) -> Any:
        """The rule's options of a group, checked as all of it; its ``state`` is whole lines from then on."""
        group["state"] = resolve(group["state"], self.states, self.factors)
        check_weights(group["weights"])
        check_range("min_size", group["min_size"], whole=True)
        check_range("seed", group["seed"], whole=True)
        for switch in ("is_paged", "keep_sign"):
            if not isinstance(group[switch], bool):
                raise UsageError(f"{switch} is True or False; got {group[switch]!r}.")
        if group["keep_sign"]:
            check_keeps_sign(group["state"], self.states)
        for switch in ("maximize", "amsgrad", "capturable", "differentiable"):
            if group.get(switch):
                raise SchemeError(f"{type(self).__name__} has no {switch}; leave it out, or use torch.optim's.")
        return self.options_type(**{f.name: group[f.name] for f in dataclasses.fields(self.options_type)})

    def _lines(self, group: dict[str, Any], p: Tensor, options: Any = None) -> dict[str, str | None]:
        """What each state of ``p`` is kept in: a quantizer line, or None for float32."""
        shapes = self.shapes(p, self._options(group) if options is None else options)
        if is_wide(p):
            return dict.fromkeys(shapes)
        return {
            name: line_for(group["state"][name], shape) if math.prod(shape) >= group["min_size"] else None
            for name, shape in shapes.items()
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
            UsageError: a gradient that is sparse or not of floating point, a parameter without numbers (meta), or an
                option out of range; GranularityError: a group was given a ``state`` that can't cut a parameter's. No
                parameter has changed then.
        """
        if closure is not None and not callable(closure):
            raise UsageError(
                f"step takes one function that evaluates the whole model and returns its loss; got {closure!r}. Call "
                "several from one function, and return their sum."
            )
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
            self._check_step(g, i, p)
        far = [(g, i, p) for g, i, p in due if self.param_groups[g]["is_paged"] and is_paged(p)]
        for g, i, p in far:
            self._check_states(g, i, p, options[g])
        apart = {p for _, _, p in far}
        near, fused = [one for one in due if one[2] not in apart], self._fused()
        with torch.no_grad():
            for g, i, p in chain(fused.take(self, near, options), in_turn(far, self.state, self._copies)):
                self._update(g, i, p, options[g])
        if not fused.waits() and all(count.device.type == "cpu" for count in self._counts().values()):
            self._warn()  # elsewhere the step would wait for the device
        return loss

    def _check_step(self, g: int, i: int, p: Tensor) -> None:
        """Raise UsageError for a parameter or gradient that can't be stepped with."""
        name, grad = self._name(g, i), p.grad
        assert grad is not None
        with within(name):
            _check_dtype(p)
            check_fits(self.param_groups[g]["weights"], p.dtype)
        if grad.layout != torch.strided:
            raise UsageError(
                f"{name} has a sparse gradient; use a dense one (nn.Embedding(sparse=False)), or "
                "torch.optim.SparseAdam for it."
            )
        if not grad.is_floating_point():
            raise UsageError(f"{name} has a gradient of {grad.dtype}; floating-point ones are served.")
        if p.is_meta:
            raise UsageError(f"{name} is on the meta device, which holds no numbers; load it first.")
        if grad.shape != p.shape:
            raise UsageError(
                f"{name} has shape {list(p.shape)}, and its gradient {list(grad.shape)}: another tensor was put into "
                "its place since backward; call zero_grad and backward again."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have."""
        return {**super().__getstate__(), "_fused_off": self._fused_off}

    def _fused(self) -> Fused:
        """The steps by kernels; of this object alone, no part of its state."""
        fused: Fused = self.__dict__.setdefault("_fused_steps", Fused())
        return fused

    def kernels(self) -> list[dict[str, Any]]:
        """Who steps what: a kernel, or the rule by torch's operators. The numbers are the same.

        Returns:
            a row for what is alike: ``parameters``, how many; ``states``, name to quantizer line (None: float32);
            ``device``; ``kernel``, its name, or None; ``reason``, why there is none.
        """
        rows: Counter[tuple[Any, ...]] = Counter()
        for g, group in enumerate(self.param_groups):
            options = self._options(group)
            for p in group["params"]:
                lines = self._lines(group, p, options)
                why, spec = self._fused().judge(self, g, p, lines)
                kernel = find_kernel(p.device) if why is None else None
                why = why or (kernel.number_refusal(spec.rule, options) if kernel else None)
                kernel = None if why else kernel
                rows[tuple(lines.items()), str(p.device), kernel.name(spec) if kernel else None, why or ""] += 1
        return [
            {"parameters": count, "states": dict(lines), "device": device, "kernel": kernel, "reason": why}
            for (lines, device, kernel, why), count in rows.most_common()
        ]

    def _check_states(self, g: int, i: int, p: Tensor, options: Any) -> None:
        """Raise UsageError where a parameter has another shape than at its last step.

        GranularityError where its group says a line by now that can't cut its states.
        """
        state, mine = self.state.get(p, {}), local(p)
        shapes = {**self.shapes(mine, options), "residual": tuple(mine.shape)}
        odd = [name for name, shape in shapes.items() if name in state and tuple(state[name].shape) != shape]
        if self.factors:  # which a matrix has, and a vector has not
            odd += [name for name in self.states if name in state and name not in shapes]
        for name in odd:
            raise UsageError(
                f"{self._name(g, i)} has shape {list(mine.shape)} now, and its {name} is of {list(state[name].shape)}: "
                "another tensor was put into its place. Build a new optimizer over it, or begin its states again: del "
                "optimizer.state[p]."
            )
        with within(self._name(g, i)):
            self._check_lines(self.param_groups[g], p, options)

    def _update(self, g: int, i: int, p: Tensor, options: Any) -> None:
        group, state, mine = self.param_groups[g], self.state[p], local(p)
        lines, step = self._lines(group, p, options), int(state["step"]) + 1 if state else 1
        old = {
            name: decode(state[name], self.states[name], p.device)
            if name in state
            else mine.new_zeros(shape, dtype=torch.float32)
            for name, shape in self.shapes(mine, options).items()
        }
        # a factor is of a whole row, which one element would take along
        guarded = any(lines.values()) or (self.factors and any(group["state"].values()))
        rule = finite_only(self.update, self._reporter(self._name(g, i))) if guarded else self.update
        before = join24(mine, state["residual"].to(p.device)) if "residual" in state else mine.float()
        moved, new = rule(before, local_gradient(p).float(), old, step, options)
        kept: dict[str, Any] = {
            name: encode(
                x,
                lines[name],
                self._generator(g, i, name, step, lines[name]),
                keep_sign=group["keep_sign"] and self.states[name] == "signed",
            )
            for name, x in new.items()
        }
        kept |= self._write(g, i, mine, moved, step)
        state.clear()
        state.update(step=count_of(step), **kept)

    def _write(self, g: int, i: int, p: Tensor, moved: Tensor, step: int) -> dict[str, Tensor]:
        """Round the new parameter into ``p``; the residual, where one is kept."""
        group = self.param_groups[g]
        if p.dtype != torch.bfloat16 or group["weights"] == "nearest":
            p.copy_(moved)
        elif group["weights"] == "stochastic":
            p.copy_(stochastic_bfloat16(moved, self._weight_generator(g, i, step)))
        else:
            weight, residual = split24(moved)
            p.copy_(weight)
            return {"residual": residual}
        return {}

    def _weight_generator(self, g: int, i: int, step: int) -> torch.Generator:
        """The stream by which a parameter is rounded stochastically after a step."""
        group = self.param_groups[g]
        device = group["params"][i].device
        return generator(group["seed"], "optim", self._stream(g, i), "weights", str(step), device=device)

    def _copies(self, device: torch.device) -> Copies:
        """What copies paged states to a device and back; of this object alone, no part of its state."""
        made: dict[torch.device, Copies] = self.__dict__.setdefault("_copies_of", {})
        if device not in made:
            made[device] = copies_for(device)
        return made[device]

    def _counts(self) -> dict[str, Tensor]:
        """Elements set aside, by parameter; of this object alone, no part of its state."""
        counts: dict[str, Tensor] = self.__dict__.setdefault("_set_aside", {})
        return counts

    def _reporter(self, name: str) -> Callable[[Tensor], None]:
        def report(count: Tensor) -> None:
            counts = self._counts()
            counts[name] = counts[name] + count if name in counts else count

        return report

    def _warn(self) -> None:
        """Say once that something was set aside."""
        if self.__dict__.get("_warned") or not (found := self.set_aside()):
            return
        self._warned = True
        where = ", ".join(f"{count} element(s) of {name}" for name, count in found.items())
        warnings.warn(
            f"NaN or infinite gradients, or ones too large for a state: {where}. They kept their values, and their "
            "states began again from 0. set_aside() has the counts from now on.",
            NonFiniteWarning,
            stacklevel=3,
        )

    def set_aside(self) -> dict[str, int]:
        """Elements that steps have left out so far because they weren't finite, by parameter; those with any."""
        counts = self._fused().set_aside()
        for name, count in self._counts().items():
            counts[name] = counts.get(name, 0) + int(count)
        return {name: count for name, count in counts.items() if count}

    def _generator(self, g: int, i: int, name: str, step: int, line: str | None) -> torch.Generator | None:
        """A stream of its own for each rounding of each state, so that a resumed run draws the same numbers."""
        if line is None or not get_rounding(quantizer(line).rounding).stochastic:
            return None
        group = self.param_groups[g]
        return generator(group["seed"], "optim", self._stream(g, i), name, str(step), device=group["params"][i].device)

    def _stream(self, g: int, i: int) -> str:
        """What tells a parameter's random numbers from others', and those of its shards."""
        return f"{g}.{i}{span(self.param_groups[g]['params'][i])}"

    # -------------------------------------------------------------------------------------------- saving and loading
    def state_bytes(self) -> dict[str, int]:
        """Bytes held now, by state: codes, scales and what else a state needs; ``step`` is 4 bytes a parameter.

        ``residual``, where there is one, is a byte for each element.
        """
        total = dict.fromkeys((*self.states, "step"), 0)
        for state in self.state.values():
            for name, kept in state.items():
                size = kept.numel() * kept.element_size() if isinstance(kept, Tensor) else kept.nbytes()
                total[name] = total.get(name, 0) + size
        return total

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a quantized state is a dict of its tensors (``codes`` uint8, ``scale`` ...) and what they mean.

        Tensors, strings and numbers only: ``torch.load(weights_only=True)`` reads it; :func:`flatten` makes it fit for
        safetensors. With ``state=None`` it is what ``torch.optim`` writes and reads.
        """
        self._warn()
        saved: dict[str, Any] = super().state_dict()
        for own, group in zip(self.param_groups, saved["param_groups"], strict=True):
            del group["is_paged"]  # where states are isn't what they are
            options = self._options(own)
            for p, index in zip(own["params"], group["params"], strict=True):
                if index in saved["state"]:
                    entry, lines = saved["state"][index].items(), self._lines(own, p, options)
                    saved["state"][index] = {name: spread(to_saved(x, lines.get(name)), p) for name, x in entry}
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
        check_is_saved(state_dict)
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
            ours = {key: own[key] for key in ("state", "min_size", "weights", "keep_sign", "is_paged")}
            groups.append({**{key: value for key, value in own.items() if key != "params"}, **theirs, **ours})
            options = self._options(groups[-1])
            for i, (index, p) in enumerate(zip(theirs["params"], own["params"], strict=True)):
                entry = saved["state"].get(index)
                if entry and not self._unborn(entry):
                    states[index] = self._restored_entry(g, i, p, dict(entry), options, convert)
        return {"state": states, "param_groups": groups}

    @staticmethod
    def _unborn(entry: Any) -> bool:
        """Whether this is of before the first step, as some of torch's optimizers make it when they are built."""
        step = entry.get("step") if isinstance(entry, Mapping) else None
        return (isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)) and bool(step == 0)

    def _restored_entry(
        self, g: int, i: int, p: Tensor, entry: dict[str, Any], options: Any, convert: bool
    ) -> dict[str, Any]:
        group, place = self.param_groups[g], self._name(g, i)
        lines, mine = self._lines(group, p, options), local(p)
        for name, value in entry.items():
            with within(f"{place}: {name}"):
                entry[name] = gathered(value, p)

        def draw(name: str) -> Any:
            return self._generator(g, i, name, 0, lines[name])

        paged_out = group["is_paged"] and is_paged(p) and not convert
        device = torch.device("cpu") if paged_out else p.device
        residual = entry.pop("residual", None)
        if residual is not None and group["weights"] != "residual8" and not convert:
            raise SchemeError(
                f"{place}: saved with weights=residual8, and kept here as {group['weights']}. Build the optimizer with "
                "weights='residual8', or leave these bits away: load_state_dict(..., convert=True)."
            )
        if not self.counts:
            entry.setdefault("step", 1.0)
        found: dict[str, Any] = dict(
            restore_entry(
                place, entry, self.shapes(mine, options), lines, self.states, device, draw if convert else None
            )
        )
        if residual is not None and group["weights"] == "residual8":
            found["residual"] = restore_residual(place, residual, mine, device)
        return found
