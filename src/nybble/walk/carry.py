"""What blocks bring from one window into the next, on disk: so that a run killed inside a window goes on at its start.

``carry-0003.safetensors`` holds, for every block that stays, its float truth, the packed layers that its trainable
twins began from, and what these have learned; its ``.json`` the descriptions and records. It appears whole, before the
parts of the blocks that leave, and goes when the next window is finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState, Record
from nybble.calibration.window import Window
from nybble.checkpoint.parts import Parts
from nybble.core.files import atomic_write_json
from nybble.core.tensorfile import write_tensorfile
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import describe, restore
from nybble.nn.layouts import Layouts
from nybble.quantizer import Quantizer
from nybble.reconstruction.norms import norms_of, put_norms
from nybble.reconstruction.transforming import resume_transform, transformed
from nybble.reconstruction.twins import put_twins, twins_of
from nybble.walk.blocks import put
from nybble.walk.job import Job


class Carry:
    """The file in front of block ``index``.

    Args:
        parts: of the run. index: of the first block that stays.
    """

    def __init__(self, parts: Parts, index: int) -> None:
        self.writes, self.tensors = parts.writes, parts.parts / f"carry-{index:04d}.safetensors"
        self.json = self.tensors.with_suffix(".carry")

    def remove(self) -> None:
        """Let go of it."""
        for path in (self.json, self.tensors) if self.writes else ():
            path.unlink(missing_ok=True)

    def write(self, states: Mapping[int, BlockState]) -> None:
        """Keep the blocks that stay."""
        if not self.writes:
            return
        tensors: dict[str, Tensor] = {}
        blocks: dict[str, Any] = {}
        for index, state in states.items():
            layouts, modules = Layouts(), {}
            for name, tensor in state.truth().items():
                tensors[f"{index}.truth.{name}"] = tensor
            for place, module in state.packed().items():
                modules[place] = describe(module, layouts)
                for name, tensor in module.state_dict().items():
                    tensors[f"{index}.packed.{place}.{name}"] = tensor
            for name, twin in twins_of(state).items():
                for key, tensor in twin.state_dict().items():
                    if not key.endswith("weight.latent"):  # the truth is there already
                        tensors[f"{index}.twin.{name}.{key}"] = tensor
            change = transformed(state)
            for key, tensor in ({} if change is None else change.moving.state_dict()).items():
                tensors[f"{index}.transform.{key}"] = tensor
            for name, norm in norms_of(state).items():
                for key, tensor in norm.state_dict().items():
                    tensors[f"{index}.norm.{name}.{key}"] = tensor
            records = {}
            for name, record in state.records.items():
                records[name] = _plain(record)
                for key in ("sample", "clip"):
                    value = getattr(record, key)
                    if value is not None:
                        tensors[f"{index}.record.{name}.{key}"] = value
            blocks[str(index)] = {
                "modules": modules,
                "layouts": layouts.entries,
                "records": records,
                "twins": list(twins_of(state)),
                "places": [] if change is None else [place.name for place in change.moving.places],
                "norms": list(norms_of(state)),
            }
        write_tensorfile(self.tensors, {name: t.detach().contiguous() for name, t in tensors.items()}, {})
        atomic_write_json(self.json, blocks)

    def read(self, index: int, window: Window, job: Job) -> None:
        """Bring a block back to where it was; ``window``: the block as the source has it."""
        from safetensors.torch import load_file

        state = window.block
        stored: dict[str, Tensor] = load_file(self.tensors, device=str(job.device))
        entry = json.loads(Path(self.json).read_text(encoding="utf-8"))[str(index)]
        truth = _below(stored, f"{index}.truth.")
        put(job, state.module, state.name, truth)
        state.learn_truth(truth)
        layouts = Layouts(entry["layouts"])
        for target in state.targets:
            place = state.place(target)
            if place in entry["modules"]:
                module = state.adopt(target, partial(_restore, place, entry["modules"][place], layouts))
                module.load_state_dict(_below(stored, f"{index}.packed.{place}."), assign=True)
        for name, plain in entry["records"].items():
            state.records[name] = _record(plain, _below(stored, f"{index}.record.{name}."), state, name)
        for step in job.reconstructions:
            moved = _below(stored, f"{index}.transform.")
            resume_transform(window, step.reconstruction, entry["places"], moved)
            put_twins(state, [t for t in state.targets if t.name in entry["twins"]], step.reconstruction)
        if entry["norms"]:
            put_norms(state)
        for name, norm in norms_of(state).items():
            norm.load_state_dict(_below(stored, f"{index}.norm.{name}."))
        for name, twin in twins_of(state).items():
            twin.load_state_dict(_below(stored, f"{index}.twin.{name}."), strict=False)


def _restore(place: str, entry: Any, layouts: Layouts, root: nn.Module) -> None:
    with torch.device("meta"):
        restore(root, place, entry, layouts)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(record: Record) -> dict[str, Any]:
    """A record as JSON, less its tensors and its input's parameters, which the packed layer has."""
    return {
        "quantizer": None if record.quantizer is None else str(record.quantizer), "number": record.number,
        "stored": record.stored, "error": record.error, "rtn_error": record.rtn_error,
        "notes": record.notes, "changed": record.changed, "learned": record.learned,
    }  # fmt: skip


def _record(plain: dict[str, Any], tensors: Mapping[str, Tensor], state: BlockState, name: str) -> Record:
    line = plain.pop("quantizer")
    target = max((t for t in state.targets if f"{name}.".startswith(f"{t.name}.")), key=lambda t: len(t.name))
    found = Record(target=target, quantizer=None if line is None else Quantizer(line), **plain)
    found.sample, found.clip = tensors.get("sample"), tensors.get("clip")
    layer: Any = state.installed(target)
    operand = name.rpartition(".")[2]
    inputs = getattr(layer, operand if operand in target.kind.operands else "inputs", None)
    if isinstance(inputs, ActivationQuantizer):
        found.inputs = inputs.quantizer, inputs.params()
    return found
