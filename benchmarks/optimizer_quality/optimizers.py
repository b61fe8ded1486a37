"""The optimizers that are compared: by name, with the 32-bit one that each is judged against.

All get the same groups: matrices decay, vectors don't. nybble's keep 32-bit states of embeddings, as they do when they
are given a module; those with ``-all`` don't, and neither do other libraries. Muon takes the hidden matrices, AdamW of
as many bits the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.optimizer_quality.tasks import Plan
from torch import Tensor, nn

Groups = list[dict[str, Any]]
Build = Callable[[nn.Module, Plan], list[torch.optim.Optimizer]]
LION = {"rate": 0.2, "decay": 5.0}  # of AdamW's (Chen et al. 2023, section 5: 3 to 10 times lower, and higher)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An optimizer of the study.

    Attributes:
        label: for tables.
        build: from groups and the plan.
        twin: the 32-bit one it is judged against; None for those.
        bits: of its states; 32 for a control that differs from its twin in rounding alone.
        needs: the library.
        everywhere: whether it runs on all tasks by default; others on the language model.
        extra: only when named.
        weights: dtype of matrices.
        muon: whether it needs hidden matrices.
    """

    label: str
    build: Build
    twin: str | None = None
    bits: int = 32
    needs: str = "nybble"
    everywhere: bool = True
    extra: bool = False
    weights: torch.dtype = torch.float32
    muon: bool = False


def groups(parameters: list[nn.Parameter], decay: float, wide: list[nn.Parameter] | None = None) -> Groups:
    """Matrices decay; gains and biases don't. Parameters in ``wide`` keep 32-bit states."""
    apart = {id(p) for p in wide or []}
    found: Groups = [
        {"params": [p for p in parameters if p.ndim > 1 and id(p) not in apart], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in parameters if id(p) in apart], "weight_decay": decay, "state": None},
    ]
    return [group for group in found if group["params"]]


def tables(model: nn.Module) -> list[nn.Parameter]:
    """The embeddings."""
    return [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]


def adamw(library: str, name: str, wide: bool = False, **options: Any) -> Build:
    """AdamW of a library; ``wide``: 32-bit states of embeddings."""

    def build(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
        parameters = list(model.parameters())
        more = options | ({"fused": parameters[0].is_cuda} if library == "torch.optim" else {})
        made = groups(parameters, plan.decay, tables(model) if wide else None)
        return [_class(library, name)(made, lr=plan.rate, betas=plan.betas, **more)]

    return build


def lion(name: str, **options: Any) -> Build:
    """Lion, at a rate and a decay that go with AdamW's."""

    def build(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
        made = groups(list(model.parameters()), LION["decay"] * plan.decay, tables(model))
        return [_class("nybble.optim", name)(made, lr=LION["rate"] * plan.rate, betas=(0.9, 0.99), **options)]

    return build


def muon(name: str, rest: str, **options: Any) -> Build:
    """Muon on hidden matrices at AdamW's rate, and AdamW on what is left."""

    def build(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
        inside = [p for key, p in model.named_parameters() if "layers." in key and p.ndim == 2]
        outside = [p for p in model.parameters() if not any(p is one for one in inside)]
        first = _class("nybble.optim", name)
        hidden = first(inside, lr=plan.rate, weight_decay=plan.decay, adjust_lr_fn="match_rms_adamw", **options)
        made = groups(outside, plan.decay, tables(model))
        other = _class("nybble.optim", rest)(made, lr=plan.rate, betas=plan.betas, **options)
        return [hidden, other]

    return build


def _class(library: str, name: str) -> Any:
    from importlib import import_module

    with warnings.catch_warnings():  # what a library looks for at import is none of ours
        warnings.simplefilter("ignore")
        return getattr(import_module(library), name)


def _ours(name: str, **about: Any) -> Choice:
    return Choice(label=f"`{name}`", build=adamw("nybble.optim", name, wide=True), twin="AdamW", **about)


def _all(name: str, **about: Any) -> Choice:
    label = f"`{name}`, embeddings too"
    return Choice(label=label, build=adamw("nybble.optim", name), twin="AdamW", **about)


def _peer(library: str, name: str, bits: int) -> Choice:
    build, label = adamw(f"{library}.optim", name), f"{library}'s `{name}`"
    return Choice(label=label, build=build, twin="AdamW", bits=bits, needs=library, everywhere=False)


def _bfloat16(weights: str, **about: Any) -> Choice:
    build = adamw("nybble.optim", "AdamW8bit", wide=True, weights=weights)
    label = f"`AdamW8bit`, bfloat16 weights, `{weights}`"
    return Choice(label=label, build=build, twin="AdamW", bits=8, weights=torch.bfloat16, **about)


CHOICES: dict[str, Choice] = {
    "AdamW": Choice(label="torch's `AdamW`", build=adamw("torch.optim", "AdamW"), needs="torch"),
    "AdamW-32": Choice(label="`AdamW(state=None)`", build=adamw("nybble.optim", "AdamW", state=None), twin="AdamW"),
    "AdamW8bit": _ours("AdamW8bit", bits=8),
    "AdamW4bit": _ours("AdamW4bit", bits=4),
    "AdamW4bit-all": _all("AdamW4bit", bits=4),
    "Factor4bit": _ours("Factor4bit", bits=4),
    "AdamWFp8": _ours("AdamWFp8", bits=8),
    "AdamW8bit-residual8": _bfloat16("residual8"),
    "Lion": Choice(label="`Lion(state=None)`", build=lion("Lion", state=None)),
    "Lion8bit": Choice(label="`Lion8bit`", build=lion("Lion8bit"), twin="Lion", bits=8),
    "Muon": Choice(label="`Muon(state=None)`", build=muon("Muon", "AdamW", state=None), muon=True),
    "Muon8bit": Choice(label="`Muon8bit`", build=muon("Muon8bit", "AdamW8bit"), twin="Muon", bits=8, muon=True),
    "Muon4bit": Choice(label="`Muon4bit`", build=muon("Muon4bit", "AdamW4bit"), twin="Muon", bits=4, muon=True),
    "AdamW8bit-all": _all("AdamW8bit", bits=8, extra=True),
    "bitsandbytes-AdamW8bit": _peer("bitsandbytes", "AdamW8bit", 8),
    "torchao-AdamW8bit": _peer("torchao", "AdamW8bit", 8),
    "torchao-AdamW4bit": _peer("torchao", "AdamW4bit", 4),
    "AdamW8bit-nearest": _bfloat16("nearest", extra=True),
    "AdamW8bit-stochastic": _bfloat16("stochastic", extra=True),
    "AdamWCompanded8bit": _ours("AdamWCompanded8bit", bits=8, extra=True),
    "Lion4bit": Choice(label="`Lion4bit`", build=lion("Lion4bit"), twin="Lion", bits=4, extra=True),
}


def suited(task: str, has_muon: bool) -> list[str]:
    """What runs on a task unless something is named, and is installed."""
    return [
        name
        for name, choice in CHOICES.items()
        if not choice.extra
        and (choice.everywhere or task == "lm")
        and (has_muon or not choice.muon)
        and find_spec(choice.needs.replace("-", "_")) is not None
    ]


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """The share of each group's highest rate; torchao's rates are tensors."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            highest = group.setdefault("highest", float(group["lr"]))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(highest * factor)
            else:
                group["lr"] = highest * factor


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of all states, without what a library shares among them (code books) and counters of steps."""
    total = 0
    for optimizer in optimizers:
        if hasattr(optimizer, "state_bytes"):
            total += sum(size for name, size in optimizer.state_bytes().items() if name != "step")
            continue
        for state in optimizer.state.values():
            total += sum(_bytes(x) for name, x in state.items() if name != "step" and not name.startswith("qmap"))
    return total


def _bytes(x: Any) -> int:
    if not isinstance(x, Tensor):
        return 0
    if hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        return sum(_bytes(getattr(x, name)) for name in names if name != "qmap")
    return x.numel() * x.element_size()
