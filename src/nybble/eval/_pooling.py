"""From an encoder's token vectors to one vector a sentence, as the ``modules.json`` beside it says.

The layout is sentence-transformers': a list of modules, each with a folder of its own for its settings and weights. A
folder without that list is pooled by the mean (Reimers & Gurevych 2019, arXiv:1908.10084), as the library does too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.data.samples import Origin

MODULES = "modules.json"
Step = Callable[[Tensor], Tensor]


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places]


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """The mean of [B, T, W] by weights [B, T]."""
    return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def _positions(real: Tensor) -> Tensor:
    """1, 2, ... from a sentence's first real token on; what is before, or padding, has 0."""
    return real.cumsum(1) * real


MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden, real: _at(hidden, real.int().argmax(1)),
    "max": lambda hidden, real: hidden.masked_fill(~real[..., None], -torch.inf).amax(1),
    "mean": lambda hidden, real: _weighted(hidden, real.float()),
    "mean_sqrt_len_tokens": lambda hidden, real: (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True).sqrt(),
    "weightedmean": lambda hidden, real: _weighted(hidden, _positions(real).float()),
    "lasttoken": lambda hidden, real: _at(hidden, _positions(real).argmax(1)),
}
"""In the order in which a list of several is joined."""
OLDER = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How token vectors become a sentence's.

    Attributes:
        modes: keys of :data:`MODES`; several are joined.
        steps: what is done to the pooled vectors.
        words: all of it, for people; with the name of what was left out, if anything was.
    """

    modes: tuple[str, ...] = ("mean",)
    steps: tuple[Step, ...] = ()
    words: str = "mean"

    def __call__(self, hidden: Tensor, real: Tensor | None) -> Tensor:
        """Pool.

        Args:
            hidden: float32 [sentences, tokens, width].
            real: bool [sentences, tokens], which are no padding; None where all are.

        Returns:
            float32 [sentences, width of the embedding].
        """
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if real is None else real
        pooled = torch.cat([MODES[mode](hidden, real) for mode in self.modes], -1)
        for step in self.steps:
            pooled = step(pooled)
        return pooled


def read_pooling(origin: Origin) -> Pooling:
    """What stands beside a model's weights; the mean where nothing does.

    A module of another kind ends the list, and :attr:`Pooling.words` says so.

    Raises:
        FileError: a list or settings that can't be read.
    """
    place = origin.side_files().get(MODULES)
    if place is None:
        return Pooling()
    with reading(place):
        listed = [
            (str(entry["type"]).rpartition(".")[2], PurePosixPath(entry["path"]).as_posix())
            for entry in json.loads(place.read_bytes())
        ]
    modes: tuple[str, ...] = ("mean",)
    steps: list[Step] = []
    words: list[str] = []
    for kind, path in listed[1:]:  # the first one is the transformer
        if kind == "Pooling":
            modes = _modes(origin, path)
            words.append("+".join(modes))
        elif kind == "Dropout":
            continue
        elif kind == "Normalize":
            steps.append(nn.functional.normalize)
            words.append("normalized")
        elif kind == "Dense" and (dense := _dense(origin, path)) is not None:
            steps.append(dense)
            words.append("dense")
        else:
            words.append(f"{kind} and what follows it left out")
            break
    return Pooling(modes=modes, steps=tuple(steps), words=", ".join(words) or "mean")


def _settings(origin: Origin, path: str) -> dict[str, Any]:
    place = origin.side_files().get(f"{path}/config.json")
    if place is None:
        raise FileError(f"{MODULES} names {path!r}, and there is no {path}/config.json beside it.")
    with reading(place):
        return dict(json.loads(place.read_bytes()))


def _modes(origin: Origin, path: str) -> tuple[str, ...]:
    settings = _settings(origin, path)
    said = settings.get("pooling_mode") or [mode for key, mode in OLDER.items() if settings.get(key)] or "mean"
    modes = (said,) if isinstance(said, str) else tuple(said)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise FileError(f"{path}/config.json pools by {unknown[0]!r}; known: {', '.join(MODES)}.")
    return modes


def _dense(origin: Origin, path: str) -> Step | None:
    """A linear layer behind the pooling; None where its weights are a pickle, or its activation isn't torch's."""
    from safetensors.torch import load_file

    settings, weights = _settings(origin, path), origin.side_files().get(f"{path}/model.safetensors")
    activation: Any = getattr(nn, str(settings.get("activation_function", "Tanh")).rpartition(".")[2], None)
    known = isinstance(activation, type) and activation.__module__.startswith("torch.nn.modules.")
    if weights is None or not known or settings.get("use_residual"):
        return None
    with reading(weights):
        tensors = load_file(weights)
        act, weight, bias = activation(), tensors["linear.weight"], tensors.get("linear.bias")

    def dense(pooled: Tensor) -> Tensor:
        offset = None if bias is None else bias.to(pooled)
        return act(nn.functional.linear(pooled, weight.to(pooled), offset))  # type: ignore[no-any-return]

    return dense
