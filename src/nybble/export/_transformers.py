"""A folder opened as users of transformers open it, and compared with what it was written from."""

from __future__ import annotations

import contextlib
import io
import logging as std_logging
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.core.seeds import preserve_global_rng
from nybble.core.tensorfile import whole
from nybble.export import Takes, Verified
from nybble.export._ct_library import quietly
from nybble.export._ct_transforms import KEY, matrix_names, rotate_online
from nybble.export._source import Layer, Source, unrotated_rows
from nybble.models.build.config_file import read_json
from nybble.models.build.skeleton import model_class
from nybble.nn.kinds import kind_of
from nybble.nn.kinds.tied import input_table

_TOKENS = 16
_CACHE = (".k_scale", ".v_scale")
"""What checkpoints have for vLLM's cache, and transformers, which caches in float, for nothing."""


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Without warnings, progress bars and log lines of other libraries."""
    from transformers.utils import logging

    theirs: Any = logging
    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    before = std_logging.root.manager.disable
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    std_logging.disable(std_logging.WARNING)
    try:
        with quietly(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        std_logging.disable(before)
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def opened(folder: Path, source: Source, dtype: torch.dtype = torch.float32, dequantize: bool = False) -> Any:
    """The model as transformers opens it, its weights dense.

    Args:
        folder: of the model.
        source: from what it was written.
        dtype: in which.
        dequantize: let transformers dequantize while it loads, instead of at the first forward.

    Raises:
        FileError: it doesn't open, or leaves tensors out.
    """
    cls: Any = model_class(source.transformers_config)
    options: dict[str, Any] = {}
    with _silently(), reading(f"{folder} by transformers"), preserve_global_rng():
        if dequantize:
            from transformers import CompressedTensorsConfig

            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        _unpack(model)
        rotate_online(model, folder)
        for parameter in model.parameters():  # some formats become bfloat16, whatever is asked for
            if parameter.is_floating_point() and dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
    stated = read_json(folder / "config.json").get("quantization_config") or {}
    rotated = matrix_names(stated.get(KEY))
    wrong = [
        *sorted(info["missing_keys"]),
        *sorted(key for key in info["unexpected_keys"] if not key.endswith((*_CACHE, *rotated))),
        *sorted(map(str, info["mismatched_keys"])),
    ]
    if wrong:
        raise FileError(f"{folder}: transformers finds tensors that don't fit the model, {wrong[0]} first.")
    return nn.Module.eval(model)


def _unpack(model: Any) -> None:
    """Do now what the library does before the first forward."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


@torch.no_grad()
def open_and_compare(
    folder: Path,
    source: Source,
    libraries: Sequence[str],
    runtimes: Sequence[Takes] = (),
    dtype: torch.dtype = torch.float32,
    dequantize: bool = False,
    unrotated: bool = False,
) -> Verified:
    """Compare every quantized weight, and the logits.

    Args:
        folder: what was written.
        source: from what.
        libraries: those that open it, for the record.
        runtimes: rows of the target's table that the files are.
        dtype: in which all is opened: that of the files, where they hold dense weights.
        dequantize: as :func:`opened`.
        unrotated: the files have the weights of layers behind a rotation as those of layers without.

    Raises:
        FileError: it doesn't open, or a weight differs.
    """
    model = opened(folder, source, dtype, dequantize)
    exact_in, count = dtype, 0
    for layer in source.layers.values():
        for ours, theirs, name in _pairs(source, model, layer, unrotated):
            count += 1
            found = _equal_in(ours, theirs.float(), (dtype, source.dtype, torch.bfloat16))
            if found is None:
                worst = (ours - theirs.float()).abs().max().item()
                raise FileError(f"{folder}: {name} isn't what was written: values differ by up to {worst:.3g}.")
            exact_in = exact_in if found == dtype else found
    cosine, largest, why = _compare_logits(source, model, dtype)
    return Verified(
        opened_with={name: version(name) for name in libraries},
        weights=count,
        exact_in=str(exact_in).removeprefix("torch."),
        cosine=cosine,
        largest=largest,
        uncalled=why,
        runtimes=runtimes,
    )


def _equal_in(ours: Tensor, theirs: Tensor, dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    """The first of some dtypes in which two float32 tensors are equal.

    A library calculates some formats in 16 bits, whatever the model is opened in: NVFP4, and scales kept in 16 bits.
    """
    return next((dtype for dtype in dtypes if torch.equal(ours.to(dtype).float(), theirs)), None)


def _pairs(source: Source, model: Any, layer: Layer, unrotated: bool) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Each matrix of a layer: what it is, what transformers has, its name."""
    if layer.kind.reads_another:
        table = source.layers[str(layer.entry.get("table", "")) or input_table(model)]
        ours = source.weight(table, next(iter(table.weights))).dequantize()
        yield ours, model.get_submodule(layer.name).weight, layer.name
        return
    if not layer.weights:
        return
    at, _, leaf = layer.name.rpartition(".") if layer.kind.fused else (layer.name, "", "")
    module = model.get_submodule(at)
    kind = (kind_of(module) or layer.kind).unrotated  # as the files have it, rotated or not
    matrix = kind.matrix(module, leaf, lambda name: getattr(module, name))
    for number, prefix in enumerate(layer.weights):
        found = whole(unrotated_rows(source, layer, prefix)) if unrotated else source.weight(layer, prefix).dequantize()
        yield found, matrix[number] if layer.kind.fused else matrix, prefix


def _compare_logits(source: Source, model: Any, dtype: torch.dtype) -> tuple[float | None, float | None, str]:
    """Cosine and largest relative difference of the logits to nybble's, or why there are none."""
    inputs = _inputs(model)
    if inputs is None:
        return None, None, f"no inputs are known for a {type(model).__name__}"
    with _silently(), preserve_global_rng():
        theirs = _output(model(**inputs))
        ours = _output(source.loaded(dtype)(**inputs))
    if theirs is None or ours is None or theirs.shape != ours.shape:
        return None, None, f"a {type(model).__name__} has no logits to compare"
    a, b = ours.double().flatten(), theirs.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300)) if a.norm() else 1.0
    largest = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
    if not math.isfinite(cosine):
        raise FileError(f"{source.place}: the logits of what was written hold NaN or Inf.")
    return cosine, largest, ""


def _inputs(model: Any) -> dict[str, Tensor] | None:
    """Some input of a model: tokens, or an image of noise."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        most = config.get_text_config().vocab_size
        ids = torch.randint(0, most, (2, _TOKENS), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return found | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if model.main_input_name == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        return {
            "pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator).to(
                model.dtype
            )
        }
    return None


def _output(found: Any) -> Tensor | None:
    """Logits; of a model without a head its hidden states."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(found, name, None)
        if isinstance(value, Tensor):
            return value
    return None
