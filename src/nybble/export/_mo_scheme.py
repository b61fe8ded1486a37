"""Which of ModelOpt's algorithms a quantized layer is, if any; and how its two config files say so.

Names and fields are those of ModelOpt 0.47 (``torch/export/quant_utils.py``, ``convert_hf_config.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.models.sources.layouts._ct_args import (
    E2M1,
    E4M3,
    E8M0,
    Args,
    CannotError,
    in_words,
    is_mx,
    is_nvfp4,
    weight_args,
)
from nybble.qtensor import Inverse, QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

NEAREST = (
    "nvfp4 with inputs in float, or nvfp4-ct static; float8_e4m3fn tensor, its inputs too (static); int4 group=128; "
    "int8 channel"
)
_TILE = [128, 128]


@dataclass(frozen=True)
class Algorithm:
    """What ModelOpt calls a layer's quantization.

    Attributes:
        name: ``quant_algo``. args: the weight's, in compressed-tensors' words. group_size: of its groups; 0 for none.
    """

    name: str
    args: Args
    group_size: int = 0

    def entry(self) -> dict[str, Any]:
        """What ``quantization`` says of it."""
        found: dict[str, Any] = {"quant_algo": self.name}
        if self.group_size:
            found["group_size"] = self.group_size
        if self.name == "W4A16_AWQ":
            found |= {"has_zero_point": False, "pre_quant_scale": True}
        return found


def algorithm_of(weight: QTensor | None, inputs: Quantizer | None, outputs: Quantizer | None) -> Algorithm:
    """Of a layer.

    Args:
        weight: its matrix, which may be on the meta device.
        inputs: what rounds what enters it.
        outputs: what rounds what leaves it.

    Raises:
        CannotError: ModelOpt has none.
    """
    if outputs is not None:
        raise CannotError(f"outputs in {outputs}", "outputs in float")
    if not isinstance(weight, BlockQTensor):
        came = "weights in float, inputs rounded" if weight is None else in_words(weight)
        raise CannotError(came, NEAREST)
    try:
        args = weight_args(weight)
    except CannotError as error:
        raise CannotError(error.came, NEAREST, error.why) from error
    found = _algorithm(weight, args, "" if inputs is None else _words(inputs))
    if found is None:
        given = "" if inputs is None else f" with inputs {inputs}"
        raise CannotError(f"{in_words(weight)}{given}", NEAREST)
    return found


def _algorithm(weight: BlockQTensor, args: Args, inputs: str) -> Algorithm | None:
    kind = _weights(weight, args)
    name = _NAMES.get((kind, inputs))
    size = int(args.get("group_size") or weight.shape[1])
    grouped = kind in ("nvfp4", "mxfp8", "int4")
    return None if name is None else Algorithm(name, args, size if grouped else 0)


def _weights(weight: BlockQTensor, args: Args) -> str:
    """A word of :data:`_NAMES` for a matrix; empty for none."""
    fmt, strategy = weight.format.name, args["strategy"]
    if fmt == E2M1:
        return "nvfp4" if is_nvfp4(weight) else "mxfp4"
    if fmt == E4M3:
        tiles = strategy == "block" and args["block_structure"] == _TILE
        return "mxfp8" if is_mx(weight) else f"fp8 {strategy}" if strategy in ("tensor", "channel") or tiles else ""
    if not args["symmetric"] or args["type"] != "int":
        return ""
    if args["num_bits"] == 8:
        return "int8" if strategy == "channel" else ""
    even = weight.shape[0] % 2 == 0  # two rows share a byte
    return "int4" if args["num_bits"] == 4 and strategy in ("group", "channel") and even else ""


def _words(quantizer: Quantizer) -> str:
    """A word of :data:`_NAMES` for what rounds inputs; ``?`` for another."""
    inner = quantizer.scale_format
    word = str(quantizer.granularity).split()[0]
    plain = not isinstance(inner, Quantizer) and not quantizer.center and not quantizer.scale.has_offset
    symmetric = not quantizer.scale.needs_integer
    if quantizer == Quantizer("nvfp4-ct static"):
        return "nvfp4 static"
    if quantizer.format.name == E4M3:
        if isinstance(inner, Quantizer):
            return "mxfp8" if inner.format.name == E8M0 and word == "group=32" else "?"
        fixed = {("tensor", True): "fp8 static", ("token", False): "fp8 token"}
        return fixed.get((word, quantizer.static), "?") if plain else "?"
    whole = quantizer.format.name in ("int8", "int8_full") and symmetric
    return "int8 static" if plain and whole and word == "tensor" and quantizer.static else "?"


_NAMES: Mapping[tuple[str, str], str] = {
    ("nvfp4", ""): "W4A16_NVFP4",
    ("nvfp4", "nvfp4 static"): "NVFP4",
    ("nvfp4", "fp8 static"): "W4A8_NVFP4_FP8",
    ("mxfp4", ""): "mxfp4",  # so its exporter has it
    ("mxfp8", "mxfp8"): "MXFP8",
    ("fp8 tensor", "fp8 static"): "FP8",
    ("fp8 channel", "fp8 token"): "FP8_PER_CHANNEL_PER_TOKEN",
    ("fp8 block", ""): "fp8_pb_wo",  # so its exporter has it
    ("int8", ""): "W8A16",
    ("int8", "int8 static"): "W8A8_SQ_PER_CHANNEL",
    ("int4", ""): "W4A16_AWQ",
}


def is_divisor(weight: QTensor) -> bool:
    """Whether an NVFP4 weight's scales are divided by a number, and ModelOpt multiplies."""
    scale = weight.params.scale if isinstance(weight, BlockQTensor) else None
    return isinstance(scale, BlockQTensor) and isinstance(scale.params.scale, Inverse)


# -------------------------------------------------------------------------------------------------------------- configs
def quantization(found: Mapping[str, Algorithm], excluded: list[str]) -> dict[str, Any]:
    """``quantization`` of hf_quant_config.json.

    Args:
        found: module -> what it is.
        excluded: modules with a matrix that stay in float.
    """
    kinds = {str(algorithm.entry()): algorithm for algorithm in found.values()}
    if len(kinds) > 1:
        layers = {name: algorithm.entry() for name, algorithm in found.items()}
        return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    (only,) = kinds.values()
    entry = only.entry()
    algo = entry.pop("quant_algo")
    return {"quant_algo": algo, "kv_cache_quant_algo": None, **entry, "exclude_modules": sorted(excluded)}


def mirrored(said: Mapping[str, Any], producer: Mapping[str, str]) -> dict[str, Any]:
    """``quantization_config`` of config.json, which says the same in other words."""
    found: dict[str, Any] = {}
    algo = str(said["quant_algo"])
    if algo in ("FP8", "NVFP4", "W4A16_NVFP4"):
        found["config_groups"] = {"group_0": {**_group(algo, said.get("group_size")), "targets": ["Linear"]}}
    elif algo == "MIXED_PRECISION":
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, entry in said["quantized_layers"].items():
            alike.setdefault((entry["quant_algo"], entry.get("group_size")), []).append(name)
        found["config_groups"] = {
            f"group_{i}": {**_group(*key), "targets": sorted(names)} for i, (key, names) in enumerate(alike.items())
        }
        found["quantized_layers"] = said["quantized_layers"]
    if said.get("kv_cache_quant_algo") == "FP8":
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        **found, "ignore": said.get("exclude_modules", []), "quant_algo": algo, "producer": dict(producer),
        "quant_method": "modelopt",
    }  # fmt: skip


def _group(algo: str, size: int | None) -> dict[str, Any]:
    """What a group of layers is, as ModelOpt's converter has it (static inputs of tokens included)."""
    bits, kind = (8, "int") if algo.startswith("W8") else (4, "int" if algo == "W4A16_AWQ" else "float")
    if algo.startswith(("FP8", "MXFP8")):
        bits = 8
    weights: dict[str, Any] = {"dynamic": False, "num_bits": bits, "type": kind}
    if size:
        weights["group_size"] = size
    if algo in ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL"):
        weights["strategy"] = "channel"
    if algo not in _CONVERTED:
        return {"quant_algo": algo}
    if "A16" in algo:
        return {"weights": weights}
    inputs: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "int" if algo.startswith("W8") else "float"}
    if algo == "NVFP4":
        inputs["num_bits"] = 4
    if size and algo in ("MXFP8", "NVFP4"):
        inputs["group_size"] = size
    return {"input_activations": inputs, "weights": weights}


_CONVERTED = (
    "NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W4A16_NVFP4", "W8A16", "W8A8_SQ_PER_CHANNEL",
    "W4A8_NVFP4_FP8", "MXFP8",
)  # fmt: skip
