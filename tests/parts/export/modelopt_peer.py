"""Run by itself where nvidia-modelopt is: its own checkpoints, what it reads in them, and what it reads in ours.

    python modelopt_peer.py FLOAT OUT OURS...

FLOAT is a folder in bfloat16. OUT gets a folder for each of its configs, beside each ``NAME.safetensors``; for each of
OURS the same in ``NAME.safetensors``, and in ``NAME.json`` the config.json that its converter makes.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
mtq: Any = import_module("modelopt.torch.quantization")
export: Any = import_module("modelopt.torch.export")
converter: Any = import_module("modelopt.torch.export.convert_hf_config")
packer: Any = import_module("modelopt.torch.export.quant_utils")
kinds: Any = import_module("modelopt.torch.quantization.qtensor")
mxfp4: Any = import_module("modelopt.torch.quantization.qtensor.mxfp4_tensor")

CONFIGS = (
    "NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG", "FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "MXFP8_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG",
    "INT8_SMOOTHQUANT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A8_NVFP4_FP8_CFG",
)  # fmt: skip
F32 = torch.float32


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Its own dequantizers on each weight; of four-bit integers its packer, which has no decoder on a CPU."""
    held, found = load_file(folder / "model.safetensors"), {}
    for name in [n.removesuffix("_scale") for n in held if n.endswith(".weight_scale")]:
        weight, scale = held[name], held[f"{name}_scale"]
        wide = torch.Size((weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)))
        if weight.dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn:
            size, above = wide[1] // scale.shape[1], held[f"{name}_scale_2"]
            packed: Any = kinds.NVFP4QTensor(wide, F32, weight)
            made = packed.dequantize(F32, scale=scale, double_scale=above, block_sizes={-1: size})
        elif scale.dtype == torch.uint8:
            kind: Any = mxfp4.MXFP4QTensor if weight.dtype == torch.uint8 else kinds.MXFP8QTensor
            made = kind(wide, F32, weight).dequantize(F32, scale=scale, block_sizes={-1: 32})
        elif weight.dtype == torch.uint8:
            codes = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1)
            size = weight.shape[1] // scale.shape[1]
            made = ((codes ^ 8).float() - 8) * scale.repeat_interleave(size, 1)
            assert torch.equal(packer.pack_int4_in_uint8(made, scale, size), weight), name
        elif scale.dim() == 4:
            tiles: Any = kinds.FP8QTensor(wide, F32, weight)
            made = tiles.dequantize(F32, scale=scale.squeeze(3).squeeze(1), block_sizes={-1: 128, -2: 128})
        else:
            kind = kinds.INT8QTensor if weight.dtype == torch.int8 else kinds.FP8QTensor
            made = kind(wide, F32, weight).dequantize(F32, scale=scale[:, None] if scale.dim() else scale)
        smooth = held.get(f"{name.removesuffix('weight')}pre_quant_scale")
        found[name] = (made if smooth is None else made * smooth.float()).contiguous()
    return found


def cached(place: str, out: Path) -> None:
    """FP8 weights, inputs and KV cache, calibrated on 32 tokens."""
    auto: Any = AutoModelForCausalLM
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] = [*config["quant_cfg"], *copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])]
    with torch.no_grad():
        model = auto.from_pretrained(place, dtype=torch.bfloat16)
        found = mtq.quantize(model, config, lambda seen: seen(torch.arange(32)[None]))
        export.export_hf_checkpoint(found, export_dir=out)


def main(place: str, out: Path, ours: list[Path]) -> None:
    """All of the above."""
    cached(place, out.with_name("cached"))
    for name in CONFIGS:
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(place, dtype=torch.bfloat16)

        def calibrate(seen: Any) -> None:
            seen(torch.arange(32)[None])

        with torch.no_grad():
            export.export_hf_checkpoint(
                mtq.quantize(model, copy.deepcopy(getattr(mtq, name)), calibrate), export_dir=out / name
            )
        save_file(values(out / name), out / f"{name}.safetensors")
    for folder in ours:
        save_file(values(folder), out / f"{folder.name}.safetensors")
        said = json.loads((folder / "hf_quant_config.json").read_text())
        (out / f"{folder.name}.json").write_text(json.dumps(converter.convert_hf_quant_config_format(said)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
