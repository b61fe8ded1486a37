"""Small models of every layout that nybble reads, each written by the library that owns it where that is installed.

Of a block two layers stay packed and the rest is float, so that one opens and decodes in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Made = tuple[Path, dict[str, Tensor]]
PACKED = ("layers.0.self_attn.q_proj.", "layers.0.mlp.up_proj.", ".experts")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def folders() -> dict[str, Callable[[Path], Path]]:
    """Reader -> writes its model into an empty place; gives the folder, or the file."""
    from tests.parts.models.layouts import (
        test_awq,
        test_bitsandbytes,
        test_experts,
        test_gptq,
        test_mlx,
        test_modelopt,
        test_mxfp4,
    )
    from tests.parts.models.layouts import test_compressed_tensors as ct

    cases = ("pack int4 zeros", "pack int3", "pack block", "int8 zeros", "fp8 block", "nvfp4", "mxfp6", "mxfp8")
    q, bnb, modelopt = "q", test_bitsandbytes.CASES, test_modelopt.checkpoint
    others: dict[str, Callable[[Path], Made]] = {
        **{f"compressed-tensors {c}": partial(_inside, ct.checkpoint, *ct.CASES[c]) for c in cases},
        "bitsandbytes nf4 nested": lambda p: test_bitsandbytes.checkpoint(p, bnb["nf4 nested"]),
        "bitsandbytes fp4 in bfloat16": lambda p: test_bitsandbytes.checkpoint(p, bnb["fp4 in bfloat16"]),
        "bitsandbytes int8": lambda p: test_bitsandbytes.checkpoint(p, bnb["int8"]),
        "gptq 4 bits in another order": lambda p: test_gptq.checkpoint(p / q, 4, 32, order=True),
        "gptq 3 bits": lambda p: test_gptq.checkpoint(p / q, 3, 40, form="gptq_v2"),
        "awq": lambda p: test_awq.checkpoint(p / q, 32),
        **{f"modelopt {kind}": partial(_inside, modelopt, kind) for kind in ("NVFP4", "MXFP8", "FP8")},
        "modelopt apart": lambda p: modelopt(p / q, "MXFP4", apart=True),
        "modelopt mixed": _mixed,
        "mlx": lambda p: test_mlx.checkpoint(p / q, "mixed"),
        "mlx nvfp4": lambda p: test_mlx.checkpoint(p / q, "nvfp4-4-16"),
        "mxfp4": lambda p: test_mxfp4.checkpoint(p / q)[:2],
        "compressed-tensors with activations and a cache": _rounded,
        "compressed-tensors experts": lambda p: test_experts.checkpoint(p / q, *ct.CASES["pack int4 zeros"])[:2],
        "auto-round": lambda p: test_gptq.checkpoint(p / q, 4, 32, form="gptq_v2"),
        "gptq of own bits": lambda p: test_gptq.checkpoint(p / q, 4, 32),
    }
    found: dict[str, Callable[[Path], Path]] = {name: partial(_small, make) for name, make in others.items()}
    found["auto-round"] = partial(_said, found["auto-round"], {
        "quant_method": "auto-round", "bits": 8, "group_size": 32, "packing_format": "auto_round", "data_type": "int",
        "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 4}, r".*q_proj": {"bits": 4, "group_size": 32}},
    })  # fmt: skip
    found["gptq of own bits"] = partial(_said, found["gptq of own bits"], {
        "quant_method": "gptq", "bits": 8,
        "dynamic": {r"-:.*down": {}, r"+:.*(q|up)_proj": {"bits": 4, "group_size": 32}},
    })  # fmt: skip
    return found | {"float in shards": _shards, "nybble": _own, "gguf": _gguf, "gguf of many types": _gguf_types}


def _inside(make: Callable[..., Made], *args: Any) -> Made:
    """Called with the folder's place last by :func:`folders`."""
    *given, place = args
    return make(place / "q", *given)


def _small(make: Callable[[Path], Made], place: Path) -> Path:
    return _few(*make(place))


def _rounded(place: Path) -> Made:
    """Static scales of inputs, and a cache whose scales are 1."""
    from tests.parts.models.layouts import test_compressed_tensors as ct

    folder, values = ct.checkpoint(place / "q", *ct.CASES["fp8 channel"])
    tensors = load_file(folder / WEIGHTS)
    modules = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    tensors |= {f"{m}.input_scale": torch.tensor([0.02]) for m in modules if any(p in f"{m}." for p in PACKED)}
    tensors |= {f"model.layers.0.self_attn.{s}_scale": torch.ones(1) for s in "kv"}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    side = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    raw["quantization_config"]["config_groups"]["group_0"]["input_activations"] = side
    raw["quantization_config"]["kv_cache_scheme"] = side
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, values


def _mixed(place: Path) -> Made:
    """ModelOpt's integers of AWQ, two rows a byte under smoothed columns, beside FP8 with one scale of the inputs."""
    from tests.parts.models.layouts import test_modelopt

    folder, values = test_modelopt.checkpoint(place / "q", "FP8")
    tensors, g = load_file(folder / WEIGHTS), torch.Generator().manual_seed(0)
    for name in [n for n in values if "up_proj" in n]:
        rows, columns = values[name].shape
        module = name.removesuffix(".weight")
        tensors[name] = torch.randint(0, 256, (rows // 2, columns), generator=g, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.rand(rows, columns // 32, generator=g) + 0.01
        tensors[f"{module}.pre_quant_scale"] = torch.rand(columns, generator=g) + 0.5
    tensors |= {f"{n.removesuffix('.weight')}.input_scale": torch.tensor(0.02) for n in values if "q_proj" in n}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    layers = {n.removesuffix(".weight"): {"quant_algo": "W4A16_AWQ" if "up_proj" in n else "FP8"} for n in values}
    raw["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, values


def _said(make: Callable[[Path], Path], quantization: dict[str, Any], place: Path) -> Path:
    """A folder whose config.json says this of the quantization."""
    folder = make(place)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    return folder


def _few(folder: Path, values: dict[str, Tensor]) -> Path:
    """One block, with two of its layers packed."""
    path = folder / WEIGHTS
    tensors = {n: t for n, t in load_file(path).items() if "layers.1." not in n}
    modules = {n.removesuffix(".weight"): t for n, t in values.items() if not any(p in f"{n}." for p in PACKED)}
    kept = {n: t for n, t in tensors.items() if not any(n.startswith(f"{m}.") for m in modules)}
    floats = {f"{m}.weight": t.to(torch.bfloat16) for m, t in modules.items() if "layers.1." not in m}
    save_file(kept | floats, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(config))
    for extra in folder.glob("tokenizer*"):
        extra.unlink()
    return folder


def _float(**changes: Any) -> Any:
    from tests.parts.models.layouts.peers import llama

    return llama(num_hidden_layers=1, **changes)


def _shards(place: Path) -> Path:
    """A float model in two shards under an index."""
    folder = place / "q"
    _float().save_pretrained(folder, max_shard_size="60KB")
    assert (folder / INDEX).is_file()
    return folder


def _own(place: Path) -> Path:
    """A folder of nybble's own, with rounded activations and a cache in few bits."""
    from nybble.pipelines.quantize import quantize
    from nybble.pipelines.request import build_recipe

    _float().save_pretrained(place / "float")
    recipe = build_recipe("rtn", weights="nvfp4", activations="int8_full token", kv="int4 group=16")
    quantize(str(place / "float"), recipe, out=place / "q")
    return place / "q"


def _gguf(place: Path) -> Path:
    """Metadata and float tensors in llama.cpp's own writer."""
    from tests.numerics.test_fuzz_files import write_gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    write_gguf(place / "it.gguf", LlamaForCausalLM(config))
    return place / "it.gguf"


def _gguf_types(place: Path) -> Path:
    from benchmarks.gguf_fuzz import tiny

    tiny(place / "it.gguf")
    return place / "it.gguf"
