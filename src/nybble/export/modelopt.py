"""ModelOpt's folders, which TensorRT-LLM and vLLM serve on NVIDIA's cards.

``hf_quant_config.json`` says what is quantized how, config.json says it again; codes and scales stay as they are. Of
NVFP4 inputs ``input_scale`` is the factor whose reciprocal, the divisor of ``nvfp4-ct static``, runtimes multiply with.
Source: nvidia-modelopt 0.47 (``torch/export/``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from nybble.core.errors import FileError, SchemeError, within
from nybble.core.files import atomic_write_json
from nybble.core.guard import reading
from nybble.core.tensorfile import stream_tensorfiles
from nybble.core.versions import VERSION
from nybble.export import ExportTarget, Facts, Refusal, Takes, Usual, Verified
from nybble.export._ct_constrain import under_divisor
from nybble.export._ct_layers import nvfp4_groups, unequal_inputs
from nybble.export._folder import SHARD_BYTES, write_beside
from nybble.export._fused import SIBLINGS, check_siblings, fused_groups
from nybble.export._last_bit import moves
from nybble.export._mo_kv import FP8, check_kv, kv_tensors, measured
from nybble.export._mo_scheme import NEAREST, Algorithm, algorithm_of, is_divisor, mirrored, quantization
from nybble.export._mo_tensors import algorithm, decoded, factor_of, placed, shared_factors
from nybble.export._names import as_stored
from nybble.export._source import Source
from nybble.models.sources.folder import weight_files
from nybble.models.sources.layouts._ct_args import CannotError
from nybble.nn.kinds import targets_of
from nybble.nn.kv_model import cached_attentions
from nybble.scheme import Rule, Scheme

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose layout it is: runtimes look for this name."""
_VLLM = "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/quantization/modelopt.py"
_TRT = "https://github.com/NVIDIA/TensorRT-LLM/blob/main/tensorrt_llm/_torch/model_config.py"
_MOST = 128  # rows of a trial
_CARD = """This folder is in the format of [ModelOpt](https://github.com/NVIDIA/Model-Optimizer), algorithm {algo}.
TensorRT-LLM serves it, and vLLM where it has the algorithm; transformers by itself loads such folders as if they were
not quantized. nybble is not needed."""


def _row(weights: str, inputs: str, form: str, runtime: str = "vllm", note: str = "") -> Takes:
    source = _VLLM if runtime == "vllm" else _TRT
    return Takes(weights=weights, inputs=inputs, form=form, runtime=runtime, since="", source=source, note=note)


class ModelOpt(ExportTarget):
    """Every algorithm of ModelOpt's that a scheme can say exactly."""

    summary = "safetensors in ModelOpt's layout, for TensorRT-LLM and vLLM"
    takes: ClassVar[tuple[Takes, ...]] = (
        _row("nvfp4", "float", "W4A16_NVFP4"),
        _row("nvfp4", "nvfp4-ct static", "NVFP4", note="inputs are rounded on Blackwell; elsewhere they stay in float"),
        _row("nvfp4", "float8_e4m3fn tensor static", "W4A8_NVFP4_FP8", "tensorrt-llm"),
        _row("float8_e4m3fn tensor", "float8_e4m3fn tensor static", "FP8"),
        _row("float8_e4m3fn channel", "float8_e4m3fn token", "FP8_PER_CHANNEL_PER_TOKEN"),
        _row("float8_e4m3fn block=128x128", "float", "fp8_pb_wo"),
        _row("mxfp8", "mxfp8", "MXFP8"),
        _row("int4 group=128", "float", "W4A16_AWQ", "tensorrt-llm", "without a scale of inputs, which AWQ would add"),
        _row("int8 channel", "float", "W8A16", "tensorrt-llm"),
        _row("int8 channel", "int8 tensor static", "W8A8_SQ_PER_CHANNEL", "tensorrt-llm"),
        _row("mxfp4", "float", "mxfp4", "tensorrt-llm", "ModelOpt writes it; no runtime is known that serves it"),
    )
    usual = Usual(weights="nvfp4")
    algorithms: ClassVar[frozenset[str]] = frozenset()
    """Those that are written; none: all."""

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:  # noqa: D102
        made = replace(scheme, rules=tuple(_rule(rule) for rule in scheme.rules), together=SIBLINGS)
        found = made.match(facts.classes).rules
        for name, rule in found.items():
            try:
                if rule.weights is not None and name in facts.without_place:
                    raise facts.without_place[name]
                with within(name):
                    self._check_rule(rule, facts.targets[name])
            except CannotError as error:
                raise SchemeError(f"{name}: ModelOpt can't hold {error}.") from error
        check_siblings(found, facts.targets)
        if scheme.kv is None or not scheme.kv.stores:
            return made
        try:
            check_kv(scheme.kv)
        except CannotError as error:
            raise SchemeError(f"ModelOpt can't hold a {error}.") from error
        return replace(made, kv=FP8 if measured(scheme.kv) else scheme.kv)

    def _check_rule(self, rule: Rule, target: Any) -> None:
        if "Embedding" in target.kind.classes:
            raise CannotError("a quantized embedding", "embeddings in float")
        if rule.matmuls is not None:
            raise CannotError("operands of attention", "--matmuls left out")
        if rule.kv is not None:
            raise CannotError(f"KV cache {rule.kv}", "one cache for all layers (--kv)")
        rows, columns = target.shape
        weight = (
            None
            if rule.weights is None
            else rule.weights.quantize(torch.ones(rows if rows % 2 else min(rows, _MOST), columns))
        )
        if weight is not None and is_divisor(weight):
            raise CannotError(str(rule.weights), "nvfp4", "its scales are divided by a number, and ModelOpt multiplies")
        self._allowed(algorithm_of(weight, rule.inputs, rule.outputs))

    def _allowed(self, found: Algorithm) -> Algorithm:
        if self.algorithms and found.name not in self.algorithms:
            raise CannotError(
                found.name,
                "nvfp4 with inputs in float (--activations none), --activations 'nvfp4-ct static' or "
                "'float8_e4m3fn tensor static'",
            )
        return found

    def check(self, source: Source) -> list[Refusal]:  # noqa: D102
        model = source.skeleton()
        bad: dict[tuple[str, str, str], list[str]] = {}
        found: dict[str, Algorithm] = {}
        for name, layer in source.layers.items():
            try:
                found[name] = self._allowed(algorithm(model, layer))
            except CannotError as error:
                bad.setdefault((error.came, error.nearest, error.why), []).append(name)
        refusals = [Refusal(layers=tuple(n), came=c, nearest=near, why=why) for (c, near, why), n in bad.items()]
        if source.kv is not None:
            try:
                check_kv(source.kv, len(cached_attentions(model)))
            except CannotError as e:
                refusals.append(Refusal(layers=("the KV cache",), came=e.came, nearest=e.nearest, why=e.why))
        if not found and not refusals:
            refusals.append(Refusal(layers=("the model",), came="all in float", nearest=NEAREST))
        return refusals or [*_unequal(source, model, found), *_inexact(source)]

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        model = source.skeleton()
        found = {name: algorithm(model, layer).name for name, layer in source.layers.items()}
        lines = []
        unserved = next((name for name, algo in found.items() if algo == "mxfp4"), None)
        if unserved is not None:
            lines.append(f"no runtime that is known serves mxfp4 weights from ModelOpt's folders: {unserved}")
        single = [group for group in fused_groups(source.layers) if found[group[0]] == "FP8"]
        apart = next((group for group in single if len({_scale(source, name) for name in group}) > 1), None)
        if apart is not None:
            lines.append(f"runtimes join {', '.join(apart)} under the largest of their scales, which rounds them again")
        if source.kv is not None and measured(source.kv):
            lines.append(
                "the KV cache is float8 without scales there (k_scale and v_scale 1); here tokens have their own"
            )
        return lines

    def shifts(self, source: Source) -> list[Refusal]:  # noqa: D102
        bad = []
        for layer in source.layers.values():
            for prefix, weight in layer.weights.items():
                factor = factor_of(source, layer, prefix) if is_divisor(weight) else None
                if factor is not None and moves(source, prefix, weight, factor):
                    bad.append(layer.name)
        why = "under its reciprocal, a factor, a last bit of values moves"
        found = Refusal(layers=tuple(dict.fromkeys(bad)), came="NVFP4 over a divisor", nearest="nvfp4", why=why)
        return [found] if bad else []

    def write(self, source: Source, folder: Path) -> None:  # noqa: D102
        model = source.skeleton()
        places = list(placed(source, model))
        floats = {name: source.copied(name) for name in source.floats}
        tensors = as_stored(model, floats, source.tensor)
        for place in places:
            tensors |= place.tensors(source)
        said = quantization({place.name: place.algorithm for place in places}, _excluded(source, model))
        if source.kv is not None:
            tensors |= kv_tensors(model, source.kv)
            said["kv_cache_quant_algo"] = "FP8"
        stream_tensorfiles(tensors, folder / "model.safetensors", {"format": "pt"}, SHARD_BYTES)
        atomic_write_json(folder / "hf_quant_config.json", {"producer": PRODUCER, "quantization": said})
        atomic_write_json(folder / "config.json", source.config | {"quantization_config": mirrored(said, PRODUCER)})
        write_beside(source, folder, _CARD.format(algo=said["quant_algo"]))

    def verify(self, folder: Path, source: Source) -> Verified:
        """Every weight by ModelOpt's formulas in torch's own dtypes: no library opens such a folder on a CPU."""
        files, count, exact = weight_files(folder), 0, "float32"
        opened: dict[Path, Any] = {}
        rows: dict[str, None] = {}
        for place in placed(source, source.skeleton()):
            found = {}
            for leaf in ("weight", "weight_scale", "weight_scale_2"):
                if (name := f"{place.name}.{leaf}") in files:
                    path = files[name][0]
                    with reading(path):
                        opened.setdefault(path, safe_open(path, framework="pt", device="cpu"))
                        found[leaf] = opened[path].get_tensor(name)
            theirs, ours = decoded(found, place.algorithm), place.matrix.read().dequantize()
            if not torch.equal(theirs, ours):
                exact = "bfloat16"
                if not torch.equal(theirs.bfloat16(), ours.bfloat16()):
                    raise FileError(f"{folder}: {place.name} isn't what was written.")
            rows[place.algorithm.name] = None
            count += 1
        return Verified(
            opened_with={"torch": torch.__version__, "nybble": VERSION}, weights=count, exact_in=exact, cosine=None,
            largest=None, uncalled="no library opens ModelOpt's folders on a CPU; the tensors were decoded",
            runtimes=tuple(row for row in self.takes if row.form in rows),
        )  # fmt: skip


def _rule(rule: Rule) -> Rule:
    """With codes packed as the files have them, and NVFP4 inputs under a calibrated divisor."""
    inputs = None if rule.inputs is None else under_divisor(rule.inputs)
    weights = rule.weights
    if weights is not None and weights.packing != "dense":
        weights = weights.replace(packing="dense")
    return replace(rule, weights=weights, inputs=inputs)


def _scale(source: Source, name: str) -> float:
    prefix = next(iter(source.layers[name].weights))
    return float(source.tensor(f"{prefix}.scale").float().reshape(-1)[0])


def _excluded(source: Source, model: Any) -> list[str]:
    """Modules with a matrix that stay in float, routers of experts and a tied head too."""
    stored = (name for name, entry in source.floats.items() if name.endswith(".weight") and len(entry.shape) == 2)
    tied = (target.name for target in targets_of(model).values() if target.matrices and not target.kind.fused)
    names = dict.fromkeys([*(name.removesuffix(".weight") for name in stored), *tied])
    return [name for name in names if name not in source.layers]


def _unequal(source: Source, model: Any, found: Mapping[str, Algorithm]) -> list[Refusal]:
    """Siblings that runtimes join, and that differ."""
    linear = [name for name in source.floats if name.endswith(".weight") and len(source.floats[name].shape) == 2]
    bad: list[Refusal] = []
    for group in fused_groups([*source.layers, *(name.removesuffix(".weight") for name in linear)]):
        theirs: Sequence[Any] = [found[name].entry() if name in found else None for name in group]
        if any(one != theirs[0] for one in theirs):
            why, nearest = "runtimes join them into one layer", "one scheme for all of them"
            bad.append(Refusal(layers=group, came="different schemes", nearest=nearest, why=why))
    shared = shared_factors(source, model)
    for group, _ in nvfp4_groups(source, model):
        own = {
            factor_of(source, source.layers[name], prefix) for name in group for prefix in source.layers[name].weights
        }
        if len(own) > 1 and group[0] not in shared and group not in {refusal.layers for refusal in bad}:
            came, nearest = "different global scales of NVFP4", "one global scale for all of them"
            bad.append(Refusal(layers=group, came=came, nearest=nearest, why="runtimes join them into one layer"))
    return [*bad, *unequal_inputs(source)]


def _inexact(source: Source) -> list[Refusal]:
    """NVFP4 weights whose scales no factor gives."""
    bad = [
        layer.name
        for layer in source.layers.values()
        for prefix, weight in layer.weights.items()
        if is_divisor(weight) and factor_of(source, layer, prefix) is None
    ]
    why = "no factor gives these values"
    return [Refusal(layers=tuple(bad), came="NVFP4 over a divisor", nearest="nvfp4", why=why)] if bad else []


PART = ModelOpt
