"""Steps by kernels: which parameters a kernel takes, and the rest, which the rule steps.

A kernel has the rule's bits and writes codes, scales and parameters in place, all of a group in one call. What it works
on is looked at before every step: another parameter, gradient or state in its place only makes it look again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nybble.ops.loader import load_at_first_use
from nybble.optim._states import Kept, Kind, count_of, encode, quantizer
from nybble.qtensor.block import BlockQTensor

Due = tuple[int, int, Tensor]
"""Group, place in it, parameter."""


@dataclass(frozen=True)
class Spec:
    """All that decides how parameters are stepped, but for numbers.

    Attributes:
        rule: name of its file. states: name, kind and quantizer line (None: float32) of each state that is kept.
        dtype: of parameter and gradient. device: theirs, and the states'. weights: how a bfloat16 is written.
        keep_sign: as the option. dims: of the parameter. even: whether its rows have an even number of elements.
    """

    rule: str
    states: tuple[tuple[str, Kind, str | None], ...]
    dtype: torch.dtype
    device: torch.device
    weights: str
    keep_sign: bool
    dims: int
    even: bool

    @property
    def guarded(self) -> bool:
        """Whether elements that aren't finite are set aside: where a state is quantized."""
        return any(line is not None for _, _, line in self.states)


@dataclass(eq=False)
class Member:
    """A parameter that a kernel steps.

    Attributes:
        p: the parameter. shape: its. entry: of the optimizer's state. kept: its states, when this was made.
        residual: int8, beside a bfloat16, or None. count: address of an int32, of elements set aside.
        signature: of its group, when this was made.
    """

    p: Tensor
    shape: torch.Size
    entry: dict[str, Any]
    kept: dict[str, Kept]
    residual: Tensor | None
    count: int
    spec: Spec
    signature: object
    refused: str | None = None

    def current(self, p: Tensor, entry: object, signature: object) -> bool:
        """Whether all of this is still so: a parameter may have been cast, moved or given other memory."""
        return (
            p is self.p
            and p.dtype == self.spec.dtype
            and p.device == self.spec.device
            and p.shape == self.shape
            and entry is self.entry
            and signature == self.signature
            and len(self.entry) == 1 + len(self.kept) + (self.residual is not None)
            and all(self.entry.get(name) is kept for name, kept in self.kept.items())
            and self.entry.get("residual") is self.residual
        )


@dataclass(frozen=True)
class Launch:
    """What a kernel steps at once.

    Attributes:
        draws: the kernel's random numbers for each gradient, or None. held: for what a kernel keeps from step to step.
    """

    spec: Spec
    options: Any
    step: int
    members: Sequence[Member]
    grads: Sequence[Tensor]
    draws: Sequence[Tensor] | None
    held: dict[Any, Any]


class Kernel(Protocol):
    """Of one type of device."""

    def refusal(self, spec: Spec) -> str | None:
        """Why it can't step such parameters; None where it can."""

    def number_refusal(self, rule: str, options: Any) -> str | None:
        """The same of the options' numbers, which may change at every step."""

    def name(self, spec: Spec) -> str:
        """What is run."""

    def draws(self, params: Sequence[Tensor], generators: Sequence[torch.Generator]) -> list[Tensor]:
        """The numbers of :func:`nybble.optim._weights.random_bits` for each parameter, as ``run`` reads them."""

    def run(self, launch: Launch) -> None:
        """Write parameters, states and residuals in place."""


class _Finder:
    """The kernel of a device."""

    def __init__(self) -> None:
        self.kernels: dict[str, Callable[[torch.device], Kernel | None]] = {}

    def register_kernel(self, device: str) -> Callable[[Any], Any]:
        def register(kernel: Any) -> Any:
            self.kernels[device] = kernel
            return kernel

        return register

    @staticmethod
    def _init_fn(device: torch.device) -> Kernel | None:
        return None

    def __call__(self, device: torch.device) -> Kernel | None:
        return self.kernels.get(device.type, self._init_fn)(device)


find_kernel = _Finder()
load_at_first_use([find_kernel])


@dataclass(eq=False)
class Fused:
    """The steps by kernels of one optimizer; not part of its state."""

    members: dict[tuple[int, int], Member] = field(default_factory=dict)
    held: dict[tuple[Spec, int], dict[Any, Any]] = field(default_factory=dict)
    counts: list[tuple[Tensor, list[str]]] = field(default_factory=list)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    shared: dict[tuple[Spec, int], tuple[list[Member], list[int], set[int]]] = field(default_factory=dict)

    def take(self, optimizer: Any, due: Sequence[Due], options: Sequence[Any]) -> list[Due]:
        """Step what kernels can; what they can't comes back."""
        rest: list[Due] = []
        launches: dict[tuple[Spec, int, int], list[Any]] = {}
        signatures: dict[int, object] = {}
        stale: list[Due] = []
        for g, i, p in due:
            if g not in signatures:
                signatures[g] = _signature(optimizer, g, p, options[g])
            member = self.members.get((g, i))
            if member is None or not member.current(p, optimizer.state.get(p), signatures[g]):
                stale.append((g, i, p))
        for g, i, p in stale:  # all of them, before a state is made or a parameter moves
            optimizer._check_states(g, i, p, options[g])
        for g, i, p in stale:
            self._made(optimizer, g, i, p, options[g], signatures[g])
        for g, i, p in due:
            member, grad = self.members[g, i], p.grad
            assert grad is not None
            if member.refused is not None or _unfit(p, grad):
                rest.append((g, i, p))
                continue
            step = int(member.entry["step"]) + 1
            launches.setdefault((member.spec, g, step), []).append((member, grad, i))
        for (spec, g, step), found in launches.items():
            kernel = find_kernel(spec.device)
            assert kernel is not None
            if kernel.number_refusal(spec.rule, options[g]) is not None:
                rest += [(g, i, member.p) for member, _, i in found]
                continue
            for part in _parts(spec, found, self._shared(spec, g, found)):
                self._run(optimizer, kernel, spec, g, step, options[g], part)
        return rest

    def _shared(self, spec: Spec, g: int, found: list[Any]) -> set[int]:
        """Which of them share memory; looked for again where others come, or lie elsewhere."""
        members, places = [member for member, _, _ in found], [member.p.data_ptr() for member, _, _ in found]
        known = self.shared.get((spec, g))
        if known is None or known[0] != members or known[1] != places:
            known = self.shared[spec, g] = members, places, _overlapping([member.p for member in members])
        return known[2]

    def _run(
        self, optimizer: Any, kernel: Kernel, spec: Spec, g: int, step: int, options: Any, found: list[Any]
    ) -> None:
        members, grads = [member for member, _, _ in found], [grad for _, grad, _ in found]
        draws = None
        if spec.weights == "stochastic":
            generators = [optimizer._weight_generator(g, i, step) for _, _, i in found]
            draws = kernel.draws([member.p for member in members], generators)
        held = self.held.setdefault((spec, g), {})
        kernel.run(Launch(spec, options, step, members, grads, draws, held))
        torch.autograd.graph.increment_version([member.p for member in members])  # a backward may still need the old
        torch._foreach_add_([member.entry["step"] for member in members], 1.0)

    # ------------------------------------------------------------------------------------------------- one parameter
    def _made(self, optimizer: Any, g: int, i: int, p: Tensor, options: Any, signature: object) -> None:
        """What is known of a parameter from now on; its states are made where there are none."""
        group, entry = optimizer.param_groups[g], optimizer.state[p]  # in the order of parameters
        lines = optimizer._lines(group, p, options)
        why, spec = self.judge(optimizer, g, p, lines)
        if why is None:
            why = _state_refusal(entry, lines, p, spec)
        if why is not None:
            self.members[g, i] = Member(p, p.shape, entry, {}, None, 0, spec, signature, why)
            return
        shapes = optimizer.shapes(p, options)
        kept = {
            name: entry[name] if name in entry else encode(p.new_zeros(shape, dtype=torch.float32), lines[name])
            for name, shape in shapes.items()
        }
        more = {}
        if spec.weights == "residual8":
            more["residual"] = entry["residual"] if "residual" in entry else torch.zeros_like(p, dtype=torch.int8)
        step = entry["step"] if "step" in entry else count_of(0)
        entry.clear()
        entry.update(step=step, **kept, **more)
        count = self._slot(optimizer, g, i, p.device)
        self.members[g, i] = Member(p, p.shape, entry, kept, more.get("residual"), count, spec, signature)

    def judge(self, optimizer: Any, g: int, p: Tensor, lines: Mapping[str, str | None]) -> tuple[str | None, Spec]:
        """Why the rule steps this parameter, or None; and what it is."""
        group = optimizer.param_groups[g]
        rule = type(optimizer).update.__module__.rpartition(".")[2]
        spec = Spec(
            rule,
            tuple((name, optimizer.states[name], line) for name, line in lines.items()),
            p.dtype,
            p.device,
            group["weights"] if p.dtype == torch.bfloat16 else "nearest",
            group["keep_sign"],
            p.dim(),
            p.dim() > 0 and p.shape[-1] % 2 == 0,
        )
        if optimizer.__dict__.get("_fused_off"):
            return "fused=False", spec
        if type(p) not in (nn.Parameter, Tensor) or not p.is_contiguous() or not p.numel():
            return "a parameter that is not one run of memory", spec
        kernel = find_kernel(p.device)
        if kernel is None:
            return f"no kernels for {p.device.type}", spec
        return kernel.refusal(spec), spec

    def _slot(self, optimizer: Any, g: int, i: int, device: torch.device) -> int:
        """Address of the count of a parameter."""
        if (g, i) not in self.slots:
            counts, names = next(
                ((c, n) for c, n in reversed(self.counts) if c.device == device and len(n) < len(c)), (None, None)
            )
            if counts is None or names is None:
                total = sum(len(group["params"]) for group in optimizer.param_groups)
                counts, names = torch.zeros(total, dtype=torch.int32, device=device), []
                self.counts.append((counts, names))
            self.slots[g, i] = counts.data_ptr() + 4 * len(names)
            names.append(optimizer._name(g, i))
        return self.slots[g, i]

    def set_aside(self) -> dict[str, int]:
        """Elements left out so far, by parameter."""
        total: dict[str, int] = {}
        for counts, names in self.counts:
            for name, count in zip(names, counts.tolist(), strict=False):
                total[name] = total.get(name, 0) + count
        return total

    def waits(self) -> bool:
        """Whether looking at the counts would wait for a device."""
        return any(counts.device.type != "cpu" for counts, _ in self.counts)


def _signature(optimizer: Any, g: int, p: Tensor, options: Any) -> object:
    """What of a group decides how its parameters are kept."""
    group = optimizer.param_groups[g]
    lines = tuple(group["state"].items())
    return lines, group["min_size"], group["weights"], group["keep_sign"], tuple(optimizer.shapes(p, options))


def _unfit(p: Tensor, grad: Tensor) -> bool:
    if not p.is_contiguous():
        return True
    if type(grad) is not Tensor or grad.dtype != p.dtype or grad.device != p.device or not grad.is_contiguous():
        return True
    return grad.is_neg() or grad._is_zerotensor()  # whose memory holds other numbers, or none


def _state_refusal(entry: Mapping[str, Any], lines: Mapping[str, Any], p: Tensor, spec: Spec) -> str | None:
    """Why a state that is there can't be written in place."""
    if (residual := entry.get("residual")) is not None:
        if spec.weights != "residual8":
            return "a residual that is to go"
        if residual.device != p.device or not residual.is_contiguous():
            return "the residual lies elsewhere than its parameter"
    for name, line in lines.items():
        kept = entry.get(name)
        tensors = list(kept.tensors().values()) if isinstance(kept, BlockQTensor) else [kept]
        for x in tensors if kept is not None else ():
            if type(x) is not Tensor or x.device != p.device or not x.is_contiguous():
                return f"{name} lies elsewhere than its parameter"
        if kept is not None and not _kept_in(kept, line):
            return f"{name} is kept otherwise"
    return None


def _kept_in(kept: Kept, line: str | None) -> bool:
    """Whether a state has the memory that a kernel of this line reads and writes: a group may say another by now."""
    if line is None or isinstance(kept, Tensor):
        return line is None and isinstance(kept, Tensor) and kept.dtype == torch.float32
    q, (codes, *scales) = quantizer(line), kept.tensors().values()
    return (
        (kept.format, kept.granularity, kept.layout) == (q.format, q.granularity, q.packing)
        and codes.dtype == torch.uint8
        and all(name == "codes" or name.startswith("scale") for name in kept.tensors())
        and all(scale.dtype == torch.float32 for scale in scales)
    )


_DRAWN = 1 << 26


def _parts(spec: Spec, found: list[Any], shared: set[int]) -> list[list[Any]]:
    """Cut where random numbers would take too much memory at once, or a parameter has memory of one before it.

    A launch writes all of its parameters at the same time.
    """
    if spec.weights != "stochastic" and not shared:
        return [found]
    parts: list[list[Any]] = [[]]
    size = 0
    for at, each in enumerate(found):
        if parts[-1] and (at in shared or (spec.weights == "stochastic" and size + each[0].p.numel() > _DRAWN)):
            parts.append([])
            size = 0
        parts[-1].append(each)
        size += each[0].p.numel()
    return parts


def _overlapping(params: list[Tensor]) -> set[int]:
    """The places in the list of those that share memory."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, at) for at, p in enumerate(params))
    shared: set[int] = set()
    most = before = -1
    for start, end, at in spans:
        if start < most:
            shared |= {before, at}
        most, before = max(most, end), at
    return shared
