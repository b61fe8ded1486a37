"""A folder opened by mlx itself, and run by mlx-lm in a process of its own, which sets limits for the whole of it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FileError, UsageError
from nybble.core.guard import reading
from nybble.core.seeds import preserve_global_rng
from nybble.export._mlx_tensors import Piece, Placed
from nybble.export._source import Source

NEEDS = ("mlx", "mlx-lm")
INSTALL = "pip install mlx mlx-lm (on Linux mlx-cpu too)"
_UNKNOWN = "UNKNOWN"
_TOKENS = 16
_RUN = f"""
import sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model, _get_classes, load_config
folder, ids, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
try:
    _get_classes(load_config(folder))
except ValueError as error:
    sys.exit("{_UNKNOWN}" + str(error))
model, _ = load_model(folder)
model.update(tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
try:
    found = np.array(model(mx.array(np.load(ids))).astype(mx.float32))
except ValueError as error:
    sys.exit("{_UNKNOWN}" + str(error) if "only supported on the GPU" in str(error) else error)
np.save(out, found)
"""


@cache
def library() -> Any:
    """The module ``mlx.core``.

    Raises:
        UsageError: it, or mlx-lm, is missing or doesn't run here.
    """
    try:
        for name in NEEDS:
            version(name)
        found = import_module("mlx.core")
    except (PackageNotFoundError, ImportError) as error:
        raise UsageError(f"--check of this target needs {' and '.join(NEEDS)}: {INSTALL}. ({error})") from error
    return found


@torch.no_grad()
def compare_weights(folder: Path, places: Sequence[Placed]) -> int:
    """Compare every weight, dequantized by mlx in float32, with nybble's.

    Returns:
        how many.

    Raises:
        FileError: one differs, or mlx can't read it.
    """
    mx = library()
    count = 0
    with reading(f"{folder} by mlx"):
        stored: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            stored |= mx.load(str(path), stream=mx.cpu)
    for place in places:
        for number, piece in enumerate(place.pieces):
            with reading(f"{place.path} in {folder}"):
                theirs = _dequantized(mx, stored, place, number)
            _compare(place, piece, theirs, folder)
            count += 1
    return count


def _dequantized(mx: Any, stored: dict[str, Any], place: Placed, number: int) -> Tensor:
    roles = ("weight", "scales", "biases", "global_scale")
    parts = {role: stored[f"{place.path}.{role}"] for role in roles if f"{place.path}.{role}" in stored}
    if place.stacked:
        parts = {role: part[number] for role, part in parts.items()}
    if place.form.mode == "affine":
        parts |= {role: parts[role].astype(mx.float32) for role in ("scales", "biases")}
    options = {"group_size": place.form.group, "bits": place.form.bits, "mode": place.form.mode}
    found = mx.dequantize(parts.pop("weight"), **parts, **options, dtype=mx.float32, stream=mx.cpu)
    return torch.from_numpy(np.array(found))


def _compare(place: Placed, piece: Piece, theirs: Tensor, folder: Path) -> None:
    ours = place.read(piece).dequantize()
    if theirs.shape != ours.shape:
        raise FileError(f"{folder}: {place.path} is {list(theirs.shape)} to mlx, and should be {list(ours.shape)}.")
    if not torch.equal(ours, theirs):
        worst = (ours - theirs).abs().max().item()
        raise FileError(f"{folder}: {place.path} isn't what was written: values differ by up to {worst:.3g}.")


@torch.no_grad()
def compare_logits(folder: Path, source: Source) -> tuple[float | None, float | None, str]:
    """Cosine and largest relative difference of mlx-lm's logits to nybble's, in float32; or why there are none.

    Raises:
        FileError: mlx-lm can't load the folder, though it knows the model.
    """
    config: Any = source.transformers_config.get_text_config()
    if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        return None, None, f"no inputs are known for a {config.model_type}"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, _TOKENS), generator=generator)
    with TemporaryDirectory() as room:
        paths = [str(folder), f"{room}/ids.npy", f"{room}/logits.npy"]
        np.save(paths[1], ids.numpy())
        done = subprocess.run([sys.executable, "-c", _RUN, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            last = said[-1] if said else f"exit code {done.returncode}"
            if last.startswith(_UNKNOWN):
                return None, None, f"mlx-lm {version('mlx-lm')}: {last.removeprefix(_UNKNOWN)}"
            raise FileError(f"{folder}: mlx-lm can't load it: {last}")
        theirs = torch.from_numpy(np.load(paths[2], allow_pickle=False))
    with preserve_global_rng():
        model: Any = source.loaded(torch.float32)
        ours = model(input_ids=ids, use_cache=False).logits
    if ours.shape != theirs.shape:
        raise FileError(f"{folder}: mlx-lm's logits are {list(theirs.shape)}, nybble's {list(ours.shape)}.")
    return _likeness(folder, ours, theirs)


def _likeness(folder: Path, ours: Tensor, theirs: Tensor) -> tuple[float, float, str]:
    a, b = ours.double().flatten(), theirs.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300)) if a.norm() else 1.0
    largest = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
    if not math.isfinite(cosine):
        raise FileError(f"{folder}: the logits of what was written hold NaN or Inf.")
    return cosine, largest, ""
