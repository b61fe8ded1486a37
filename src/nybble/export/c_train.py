"""A whole training step as plain C with a Makefile: forward, both gradients, SGD, in 16-bit floats of one sample.

Weights are what the model's are dequantized, rounded to the type. What is to learn, and how, stands in config.json
under ``c_train`` (:class:`nybble.microcontroller.settings.Settings`). Source: arXiv:2305.19167.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from nybble.calibration.error import relative_error
from nybble.core.errors import FileError, ModelError, NybbleError
from nybble.core.options import build
from nybble.core.seeds import preserve_global_rng
from nybble.export import Cast, ExportTarget, Facts, Refusal, Takes, Verified
from nybble.export._folder import write_beside
from nybble.export._source import Source
from nybble.export.dense import _read, _tensors
from nybble.microcontroller.compiler import find_compiler, make, version
from nybble.microcontroller.memory import memory
from nybble.microcontroller.project import write_project
from nybble.microcontroller.settings import Settings
from nybble.microcontroller.stack import Stack, plan
from nybble.microcontroller.trace import stack_of
from nybble.scheme import Scheme

_TYPES = {
    "float16": "float16", "f16": "float16", "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float32": "float32", "f32": "float32", "fp32": "float32",
}  # fmt: skip
_CARD = """A training step as C: `make check` runs it against reference tensors, `make time` counts multiply-adds per
clock, `net.h` says how it is called. nybble is not needed."""


class CTrain(ExportTarget):
    """C; the option is the type of all numbers, by default float16."""

    summary = "a training step as C with a Makefile, in 16-bit floats: small convolutional networks"
    in_float = from_float = True
    rotates = True  # folded into the weights
    drops_rounding = True
    loses = "codes and scales; the rounding of inputs and outputs; BatchNorms become part of their convolutions"
    options: ClassVar[Mapping[str, str]] = {name: f"all numbers in {kind}" for name, kind in _TYPES.items()}
    takes = (
        Takes(
            weights="any",
            inputs="float",
            form="C",
            runtime="gcc",
            since="12",
            source="https://gcc.gnu.org/gcc-12/changes.html",
            note="small convolutional networks of one input size; _Float16 and bit equality on x86-64",
        ),
    )

    def require(self, check: bool) -> None:
        """With ``check``, gcc and make."""
        if check:
            find_compiler()

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:
        """Any scheme fits, of a network that C can express.

        Raises:
            ModelError: it can't; names the layer.
        """
        _stack(facts.model, facts.config)
        return scheme

    def check(self, source: Source) -> list[Refusal]:
        """Nothing is refused layer by layer: there is no other form of a layer that would do; no weight is read.

        Raises:
            ModelError: a layer that C can't express, named. UsageError: options that can't be, or more memory than the
                limit among them, with the table of layers.
        """
        settings, stack = self._settings(source), _held(source)
        needs = memory(stack, settings.dtype, settings.trained)
        if settings.memory:
            needs.refuse_above(settings.memory)
        return []

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        settings, stack = self._settings(source), _held(source)
        lines = [
            f"a step needs {memory(stack, settings.dtype, settings.trained).bytes:,} bytes of arrays (memory.json)"
        ]
        if stack.learned[-1].name not in plan(stack, settings.trained).updated:
            lines.append(f"the last layer, {stack.learned[-1].name}, isn't named by update: training may not converge")
        if any(layer.inputs or layer.outputs for layer in source.layers.values()):
            lines.append("activations are not rounded to a quantizer's codes any more")
        return lines

    def casts(self, source: Source) -> list[Cast]:  # noqa: D102
        to = self._settings(source).type
        names = [layer.name for layer in _held(source).learned]
        return [] if to == "float32" else [Cast(name=name, came="float32", to=to) for name in names]

    def write(self, source: Source, folder: Path) -> None:  # noqa: D102
        settings, stack = self._settings(source), _stack(_dense(source), source.config)
        write_project(stack, folder, settings)
        for name, held in stack.weights.items():
            rows = held["weight"].reshape(1, -1)
            self.errors[name] = relative_error(rows, rows.to(settings.dtype).float(), None)
        write_beside(source, folder, _CARD, "c")

    def verify(self, folder: Path, source: Source) -> Verified:
        """Compiled by gcc, the scalar and the vector kernels give the reference tensors bit for bit.

        Raises:
            FileError: they don't. UsageError: no compiler.
        """
        settings = self._settings(source)
        for lanes in sorted({1, settings.lanes}):
            try:
                make(folder, "check", LANES=lanes)
            except NybbleError as error:
                raise FileError(f"{folder}: {error}") from error
        make(folder, "clean")
        stack = _held(source)
        return Verified(
            opened_with={"gcc": version()},
            weights=len(stack.learned),
            exact_in=settings.type,
            cosine=None,
            largest=None,
            uncalled="tensors of a training step were compared instead, all equal",
            runtimes=self.takes,
        )

    def _settings(self, source: Source) -> Settings:
        """What config.json says; the option has the last word about the type."""
        given = source.config.get("c_train", {})
        if not isinstance(given, dict):
            raise ModelError(f"config.json: c_train is {given!r:.80}; a mapping of options is needed.")
        found = build(Settings, given, "c_train")
        return replace(found, type=_TYPES[self.option]) if self.option else found


def _held(source: Source) -> Stack:
    """The layers of what is exported, without their weights; traced once."""
    if ("c-train", "stack") not in source.known:
        source.known["c-train", "stack"] = _stack(source.skeleton(), source.config)
    found: Stack = source.known["c-train", "stack"]
    return found


def _stack(network: nn.Module, config: Mapping[str, Any]) -> Stack:
    """The layers of a model of transformers.

    Raises:
        ModelError: it has one that C can't express.
    """
    try:
        with preserve_global_rng(), torch.no_grad():
            return stack_of(network, _shape(config))
    except ModelError as error:
        kind = type(network).__name__
        raise ModelError(f"target c-train can't hold this model, a {kind}: {error}") from error


def _shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of what a model reads.

    Raises:
        ModelError: config.json doesn't say.
    """
    size = config.get("image_size")
    sides = [size, size] if isinstance(size, int) else size
    channels = config.get("num_channels")
    if not isinstance(channels, int) or not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ModelError(
            "config.json says no num_channels and image_size, which C needs; it takes networks that read images of one "
            "size (add image_size: a number, or height and width)."
        )
    return channels, int(sides[0]), int(sides[1])


def _dense(source: Source) -> nn.Module:
    """The float model with dequantized weights, in float32."""
    network: Any = source.skeleton()
    tensors = _tensors(source, network, torch.float32, {})
    held = {name: _read(source, tensors, name).float() for name in tensors}
    made: nn.Module = type(network)(source.transformers_config)
    made.load_state_dict(held, strict=False)
    return made.eval()


PART = CTrain
