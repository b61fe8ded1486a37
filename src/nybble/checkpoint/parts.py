"""The files of a quantized model: one part a block while the work runs, one safetensors file when it is done.

``OUT.partial/parts/block-0007.safetensors`` and its ``.json`` (descriptions and report rows) appear whole, the JSON
last, so that a block either is done or is not. But for ``times.json`` the result holds no times: the same inputs give
the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.checkpoint.card import CARD, card
from nybble.checkpoint.describe import quantization_config, renumber
from nybble.checkpoint.marked import COMPRESSED, FORM, MANIFEST, NATIVE
from nybble.checkpoint.read import Checkpoint, checkpoint_of
from nybble.core.errors import FileError
from nybble.core.files import atomic_write_json, atomic_write_text
from nybble.core.guard import reading
from nybble.core.tensorfile import merge_tensorfiles, write_tensorfile
from nybble.core.tensorheader import read_tensor_header
from nybble.nn.kinds import describe, quant_modules, restore_all
from nybble.nn.kv_model import KVRecord
from nybble.nn.layouts import Layouts

SHARD_BYTES = 5_000_000_000
EVALUATION = "evaluation.json"
REQUEST = "request.json"
MARK = ".mark"
PREPARED, LEARNED = "prepared.safetensors", "learned.safetensors"
"""How names end of parts that need no JSON: what was trained first, and what transforms learned of all blocks."""
TIMES = "times.json"
"""How long learning took on each window: the one file that two runs of a request don't have alike."""
SPILL = "hidden.bin."  # and the number of the stack

Writer = Callable[[Checkpoint, Path, dict[str, Any]], str]
"""Writes weight files, config.json and a card into a folder, of all parts as one checkpoint and a manifest, in
compressed-tensors' form; or writes nothing, and returns why."""


def _never(name: str) -> bool:
    return False


class Parts:
    """The parts of an unfinished model in ``folder``; with ``resume`` those of an earlier run count.

    ``request.json`` stays until the folder is complete, and the manifest is the last of its other files to appear: so a
    run killed while it assembles or clears up goes on where it was, too.

    Args:
        folder: ``OUT.partial``.
        request: everything that decides the bytes; a resumed run must ask for the same.
        resume: continue; otherwise what is there is cleared.
        writes: false for a process beside the one that writes: it only reads what that one has made before.

    Raises:
        FileError: resumed with another request; names what differs.
    """

    def __init__(self, folder: Path, request: dict[str, Any], resume: bool, *, writes: bool = True) -> None:
        self.folder, self.parts, self.writes = folder, folder / "parts", writes
        if not writes:
            return
        for left in folder.glob(f"{SPILL}*"):
            left.unlink()
        before = begun_with(folder) if resume else None
        if before is None:
            for child in folder.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            atomic_write_json(folder / REQUEST, request)
        else:
            same_request(folder, {**request, **before} if self.assembled else before, request)
        self.parts.mkdir(exist_ok=True)

    @property
    def assembled(self) -> bool:
        """Whether all final files are there (parts may be left)."""
        return (self.folder / MANIFEST).exists()

    def check_form(self, asked: str) -> None:
        """Refuse to go on from a folder that is complete in another form than the one that is asked for.

        Raises:
            FileError: it is.
        """
        if not self.assembled:
            return
        form = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8")).get(FORM, {}).get("name", NATIVE)
        if asked in (NATIVE, COMPRESSED) and asked != form:
            raise FileError(
                f"{self.folder} is complete, in the form {form}; now it is to be {asked}. Repeat the first command, or "
                "start anew without --resume."
            )

    def begun(self, names: list[str]) -> str:
        """What an earlier run left, in a line."""
        done = sum(self.done(name) for name in names)
        if self.assembled or done:
            return f"resuming: {len(names) if self.assembled else done} of {len(names)} parts are done"
        return f"nothing to resume in {self.folder}; starting anew"

    def done(self, name: str) -> bool:
        """Whether part ``name`` is complete."""
        return (self.parts / f"{name}.json").exists()

    def write(
        self,
        name: str,
        prefix: str,
        module: nn.Module,
        rows: list[dict[str, Any]],
        without: Callable[[str], bool] = _never,
    ) -> None:
        """Store a module's tensors, the descriptions of its quantized layers, and its rows.

        Args:
            name: of the part.
            prefix: of the module, with a dot; empty for the whole model.
            module: with real tensors; of those that are tied, the name that transformers keeps is kept.
            rows: of its layers.
            without: says which names are in other parts.
        """
        if not self.writes:
            return
        first: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        tied = getattr(module, "all_tied_weights_keys", {})
        for key, tensor in sorted(module.state_dict(keep_vars=True).items(), key=lambda item: item[0] in tied):
            if without(key) or without(tied.get(key, key)):  # a block's, which this one is tied to: UDOP's biases
                continue
            if first.setdefault(id(tensor), key) == key:
                tensors[f"{prefix}{key}"] = tensor.detach()
        layouts = Layouts()
        found = [(key, m) for key, m in quant_modules(module) if not without(key)]
        modules = {f"{prefix}{key}": describe(m, layouts) for key, m in found}
        write_tensorfile(self.parts / f"{name}.safetensors", tensors, {})
        atomic_write_json(
            self.parts / f"{name}.json",
            {"modules": modules, "layouts": layouts.entries, "rows": rows},
        )

    def took(self, window: str, seconds: list[float]) -> None:
        """Keep how long learning on a window took, every time that something was learned on it."""
        if self.writes:
            atomic_write_json(self.parts / f"{window}.times", seconds)

    def times(self) -> dict[str, list[float]]:
        """Of all windows, by name."""
        found = sorted(self.parts.glob("*.times"))
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The report rows of a finished part."""
        found: list[dict[str, Any]] = self._json(name)["rows"]
        return found

    def restore(self, name: str, root: nn.Module, device: torch.device) -> None:
        """Put a finished part's quantized modules and tensors into ``root`` (the whole model)."""
        data = self._json(name)
        layouts = Layouts(data["layouts"])
        restore_all(root, data["modules"], layouts)
        root.load_state_dict(self._tensors(name, device), strict=False, assign=True)

    def _tensors(self, name: str, device: torch.device) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        found: dict[str, Tensor] = load_file(self.parts / f"{name}.safetensors", device=str(device))
        return found

    def mark(self, stage: str) -> None:
        """Say that a stage's parts, written as ``NAME.STAGE``, are all there."""
        atomic_write_json(self.parts / f"{stage}{MARK}", {})

    def marked(self, stage: str) -> bool:
        """Whether they are."""
        return (self.parts / f"{stage}{MARK}").exists()

    def take(self, names: list[str], stage: str) -> None:
        """Let a marked stage's parts stand in the places of those before it; those that do already stay."""
        for name in names:
            for ending in ("safetensors", "json"):
                staged = self.parts / f"{name}.{stage}.{ending}"
                if staged.exists():
                    staged.replace(self.parts / f"{name}.{ending}")

    def fill(self, name: str, root: nn.Module, block: nn.Module, device: torch.device) -> None:
        """Give a block of ``root`` its finished part's tensors; before that its quantized modules, if it lacks them."""
        if {key for key, _ in quant_modules(root)} >= self._json(name)["modules"].keys():
            root.load_state_dict(self._tensors(name, device), strict=False, assign=True)
        else:
            self.restore(name, root, device)

    def assemble(
        self,
        names: list[str],
        config: dict[str, Any],
        manifest: dict[str, Any],
        kv: KVRecord | None = None,
        write: Writer | None = None,
    ) -> None:
        """Make the final files in ``folder`` of all parts.

        Args:
            names: of the parts.
            config: of the float model's config.json.
            manifest: what nybble.json says beside the rows and the form.
            kv: what the model caches in.
            write: writes them in another form than nybble's own; None: that one.
        """
        found = self._gathered(names, config, kv)
        for left in self.folder.glob("model*.safetensors*"):  # of a run that was killed here, perhaps in another form
            left.unlink()
        why = "" if write is None else write(found, self.folder, manifest)
        form: dict[str, Any] = {"name": NATIVE, "why": why} if why else {"name": NATIVE}
        quantization = found.config["quantization_config"]
        if write is not None and not why:
            form = {"name": COMPRESSED, "quantization": quantization}
        else:
            files = [self.parts / f"{name}.safetensors" for name in names]
            merge_tensorfiles(files, self.folder / "model.safetensors", {"format": "pt"}, SHARD_BYTES)
            atomic_write_json(self.folder / "config.json", config | {"quantization_config": quantization})
            atomic_write_text(self.folder / CARD, card(config, manifest, why))
        if times := self.times():
            atomic_write_json(self.folder / TIMES, times)
        rows = [row for name in names for row in self.rows(name)]
        atomic_write_json(self.folder / MANIFEST, manifest | {FORM: form, "layers": rows})

    def _gathered(self, names: list[str], config: dict[str, Any], kv: KVRecord | None) -> Checkpoint:
        """All parts as one checkpoint; no tensor is read."""
        layouts = Layouts()
        modules: dict[str, Any] = {}
        for name in names:
            data = self._json(name)
            numbers = [layouts.add(entry) for entry in data["layouts"]]
            modules |= {module: renumber(entry, numbers) for module, entry in data["modules"].items()}
        headers = [read_tensor_header(self.parts / f"{name}.safetensors") for name in names]
        quantization = quantization_config(modules, layouts, kv)
        return checkpoint_of(self.parts / "all", config | {"quantization_config": quantization}, headers)

    def finish(self) -> list[dict[str, Any]]:
        """Remove what isn't part of the result; returns all rows."""
        shutil.rmtree(self.parts)
        (self.folder / REQUEST).unlink(missing_ok=True)
        manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        layers: list[dict[str, Any]] = manifest["layers"]
        return layers

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.parts / f"{name}.json").read_text(encoding="utf-8"))
        return found


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The request that began an unfinished folder, or None.

    A complete one, killed before it was moved, says it in its manifest, without what differs between machines.
    """
    for name in (REQUEST, MANIFEST):
        if (folder / name).exists():
            with reading(f"{folder / name}, which --resume goes by (start anew without it),"):
                found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
                return {key: value for key, value in found.items() if key not in ("name", "layers", "untried", FORM)}
    return None


def holds_finished(folder: Path) -> bool:
    """Whether an unfinished folder has anything that a resumed run need not do again."""
    parts = folder.glob("parts/*")
    return (folder / MANIFEST).exists() or any(part.name.endswith((".json", PREPARED, LEARNED)) for part in parts)


def cleared(folder: Path) -> str:
    """What is said of an unfinished folder with finished parts before a run that doesn't resume it clears them."""
    return f"{folder} holds what an earlier run finished; starting anew clears it, --resume would go on from there"


def same_request(folder: Path, before: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise FileError, naming what differs, unless what began ``folder`` asked for the same as ``request``."""
    was, now = _leaves(before), _leaves(request)
    order = ("method", "settings")  # what else there is may follow of them
    known = sorted({*was, *now}, key=lambda key: (*(key.partition(".")[0] != first for first in order), key))
    differs = [key for key in known if was.get(key) != now.get(key)]
    if differs:
        key = differs[0]
        raise FileError(
            f"{folder} was begun with {key} = {_short(was.get(key))}; now it is {_short(now.get(key))}. "
            "Repeat the first command, or start anew without --resume."
        )


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, item in value.items() for k, v in _leaves(item, f"{path}.{key}" if path else key).items()}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
