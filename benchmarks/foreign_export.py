"""Memory and time of exporting another library's folder: GPTQ's words, 1.1 billion random weights, four shards.

    PYTHONPATH=.:src python benchmarks/foreign_export.py --out benchmarks/results/foreign_export.json

The export runs in a process of its own, whose peak memory is the system's own count (pages of files that it maps are in
it); beside it the peak of one that only imports, and the seconds of copying the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nybble.core.files import atomic_write_json

SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
GROUP, SHARDS = 128, 4


def make(folder: Path, sizes: dict[str, int]) -> int:
    """A folder of random codes; the bytes of its largest shard."""
    from transformers import LlamaConfig

    config = LlamaConfig(**sizes, dtype="float16", architectures=["LlamaForCausalLM"])  # type: ignore[arg-type]
    said = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    folder.mkdir()
    raw = json.loads(config.to_json_string(use_diff=False)) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(raw))
    g = torch.Generator().manual_seed(0)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    index: dict[str, str] = {}
    largest, layers = 0, sizes["num_hidden_layers"]
    for shard in range(SHARDS):
        tensors: dict[str, Tensor] = {}
        for layer in range(layers * shard // SHARDS, layers * (shard + 1) // SHARDS):
            for name, (rows, columns) in shapes.items():
                tensors |= {f"model.layers.{layer}.{name}.{k}": t for k, t in _layer(rows, columns, g).items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.float16)
        ends = {0: ("model.embed_tokens",), SHARDS - 1: ("lm_head",)}.get(shard, ())
        for name in ends:
            tensors[f"{name}.weight"] = torch.randn(sizes["vocab_size"], hidden, generator=g).half()
        if shard == 0:
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.float16)
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
        largest = max(largest, (folder / file).stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return largest


def _layer(rows: int, columns: int, g: torch.Generator) -> dict[str, Tensor]:
    words = torch.randint(-(1 << 31), 1 << 31, (columns // 8, rows), generator=g).int()
    return {
        "qweight": words,
        "qzeros": torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": (torch.rand(columns // GROUP, rows, generator=g) * 0.01 + 1e-3).half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def run(words: list[str]) -> dict[str, Any]:
    """A command of this file in a process of its own: seconds, and MiB at its peak."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return {"seconds": round(time.monotonic() - began, 1), "peak_mib": int(done.stdout.split()[-1]) // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--targets", nargs="*", default=["compressed-tensors"])
    parser.add_argument("--room", type=Path, help="where the folders go")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        from nybble.pipelines.export import export

        source, dest, target = options.export
        if target != "none":
            export(source, dest, target)
        status = Path("/proc/self/status").read_text()  # getrusage's would begin with what this process was forked from
        print(status.partition("VmHWM:")[2].split()[0])
        return
    with tempfile.TemporaryDirectory(dir=options.room) as room:
        folder = Path(room, "gptq")
        shard = make(folder, {**SHAPE, "num_hidden_layers": options.layers})
        size = sum(path.stat().st_size for path in folder.iterdir())
        began = time.monotonic()
        shutil.copytree(folder, Path(room, "copy"))
        found: dict[str, Any] = {
            "command": f"python benchmarks/foreign_export.py --layers {options.layers}",
            "bytes": size, "largest_shard": shard,
            "layers": options.layers, "copy_seconds": round(time.monotonic() - began, 1),
            "imports": run(["--export", str(folder), f"{room}/no", "none"]),
        }  # fmt: skip
        shutil.rmtree(Path(room, "copy"))
        for target in options.targets:
            found[target] = run(["--export", str(folder), f"{room}/{target.replace(':', '-')}", target])
            print(target, found[target], flush=True)
    found |= {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    print(found)
    if options.out:
        atomic_write_json(options.out, found)


if __name__ == "__main__":
    main()
