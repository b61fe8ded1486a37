"""Data of a report, made up: as many layers as SmolLM2 has, with pictures of the real size."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from nybble.formats import get_format

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


LINES = {"weights": "float4_e2m1fn channel", "inputs": "float4_e2m1fn shifted static"}
SCHEME = {"rules": [{"targets": ["Linear"], **LINES}], "ignore": ["lm_head"]}


def picture(rng: random.Random, name: str) -> dict[str, Any]:
    counts = [int(2e5 * math.exp(-(((i - 31.5) / 9) ** 2) / 2) * rng.uniform(0.9, 1.1)) for i in range(64)]
    return {"edge": 1.25 * get_format(name).absmax, "counts": counts, "clipped": 0.001234, "format": name}


def layer(index: int, kind: str, rng: random.Random) -> dict[str, Any]:
    rtn = 10 ** rng.uniform(-3, -1)
    columns = 1536 if kind == "mlp.down_proj" else 576
    loud = sorted((10 ** rng.uniform(-1, 1.5) for _ in range(64)), reverse=True)
    name = rng.choice(("float4_e2m1fn", "float4_e3m0"))
    return {
        "name": f"model.layers.{index}.{kind}",
        "shape": [576, columns],
        "weights": f"{name} channel",
        "inputs": "float4_e2m1fn shifted static",
        "outputs": None,
        "bits": 4.0278,
        "sqnr": 18 + 3 * rng.random(),
        "error": rtn * rng.uniform(0.2, 0.9),
        "rtn_error": rtn,
        "input_scale": 0.1234,
        "input_shifts": [columns - 60, 40, 15, 5],
        "clip": [0.412, 0.733, 1.0],
        "notes": ["kept round-to-nearest"] if index == 1 else [],
        "weight_picture": picture(rng, name),
        "input_picture": {
            "histogram": picture(rng, "float4_e2m1fn"),
            "inter": 10 ** rng.uniform(-1, 0),
            "intra": 10 ** rng.uniform(-2, -0.5),
            "channels": [[float(f"{v:.4g}"), float(f"{v / 7:.4g}")] for v in loud],
        },
    }


def learned(index: int) -> dict[str, Any]:
    """Of the first layer of a window of two blocks."""
    curve = [[4.5 + 10 * step, float(f"{0.02 * math.exp(-step / 8):.4g}")] for step in range(20)]
    window = {
        "window": f"block {index}", "blocks": 2, "loss": "mse", "before": 0.02, "after": 0.005, "steps": 200,
        "kept": 173, "diverged": False, "precision": "bfloat16",
    }  # fmt: skip
    return {"windows": [window | {"curve": curve}], "left_nearest": 0.0712, "scales": [0.81, 0.99, 1.0]}


def manifest(blocks: int = 30) -> dict[str, Any]:
    rng = random.Random(0)
    return {
        "name": "SmolLM2-135M",
        "format_version": 1,
        "model": "451de221dfb200cff436e8e4d5a6cffb2aca478cc149e2b802768c9d9a3484b4",
        "recipe": {"name": "llm-fp4", "summary": "Formats and clips searched.", "source": "arXiv", "scheme": SCHEME},
        "data": {"source": "builtin", "source_sha256": "ab12" * 16, "samples": 128, "seq_len": 512},
        "settings": {"seed": 7, "batch": 8},
        "versions": {"nybble": "0.1.0", "torch": "2.13.0"},
        "layers": [layer(i, kind, rng) for i in range(blocks) for kind in KINDS],
    }


def evaluation() -> dict[str, Any]:
    return {
        "data": {"source": "held-out", "source_sha256": "cd34" * 16},
        "models": {
            "float": {"ppl": 14.123, "kl": 0.0},
            "quantized": {"ppl": 15.789, "kl": 0.1234, "agreement": 0.8, "new_metric": 3.5},
        },
        "samples": [{"prompt": "The sea is", "float": " wide and blue.", "quantized": " wide and green."}],
    }


def page_data(blocks: int = 30, title: str = "smollm2-fp4") -> dict[str, Any]:
    return {
        "title": title,
        "manifest": manifest(blocks),
        "config": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": blocks, "hidden_size": 576},
        "sizes": {
            "total": 110_000_000,
            "bytes": {"codes": 53_000_000, "scales": 500_000, "unquantized": 56_400_000, "tokenizer": 100_000},
            "parameters": 134_515_008,
            "quantized_parameters": 106_168_320,
            "bits_per_weight": 6.54,
            "bits_per_quantized_weight": 4.03,
        },
        "evaluation": evaluation(),
    }


def save_quantized(folder: Path, **changes: Any) -> Path:
    """A real quantized tiny model in ``folder / "out"``, with an evaluation beside it."""
    import json

    import torch
    from tests.tiny import save_text, save_tiny

    from nybble.pipelines.quantize import quantize
    from nybble.pipelines.request import build_recipe
    from nybble.walk.settings import Settings

    torch.set_num_threads(1)
    recipe = build_recipe("gptq", weights="int4 group=16", activations="int8 token")
    text = save_text(folder / "text.txt", 400)
    settings = Settings(samples=4, seq_len=16, batch=2)
    quantize(str(save_tiny(folder / "model")), recipe, str(text), out=folder / "out", settings=settings)
    (folder / "out" / "evaluation.json").write_text(json.dumps(evaluation() | changes))
    return folder / "out"
