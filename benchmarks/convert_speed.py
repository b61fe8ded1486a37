"""How fast models are converted and exported, beside copying as many bytes.

    python benchmarks/convert_speed.py [--only smollm2]     writes benchmarks/results/convert_speed.json

Rows that are not measured again stay as they are.

Two shapes: SmolLM2's (135M) and a llama of 1.1 billion weights, of random numbers made here. A process first converts a
model of two tiny layers: ``start_seconds`` is what that takes, nearly all of it imports of torch and transformers. Then
conversions and copies take turns. A copy is ``shutil.copyfile`` of what the conversion wrote, and reads what more the
source has; both end with the files on the disk (fsync). ``of_copy`` is the median of the turns' ratios, ``seconds``,
``cpu_seconds`` and those of the copy are medians, too. On a machine that others use, ``load`` says how many wanted its
cores, and ``of_copy_cpu`` compares the processor's time, which they move less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "convert_speed.json"
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 128, "tie_word_embeddings": False,
}  # fmt: skip
CASES = (
    ("int4", "compressed-tensors"), ("int4", "modelopt"), ("int4", "gguf"), ("int4", "dense"), ("int4", "mlx"),
    ("nvfp4", "compressed-tensors"), ("nvfp4", "modelopt-nvfp4"), ("nvfp4", "gguf"), ("nvfp4", "dense"),
    ("fp8", "modelopt"), ("fp8", "dense"),
)  # fmt: skip
"""What A is (written by nybble's compressed-tensors target's own layout), and the target."""


def layers(sizes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Linear layers of a llama: name -> [out, in]."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kv = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    of = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}": shape for i in range(sizes["num_hidden_layers"]) for name, shape in of.items()}


def packed(kind: str, shape: tuple[int, int], g: torch.Generator) -> dict[str, torch.Tensor]:
    """A random weight as compressed-tensors keeps it."""
    rows, columns = shape
    if kind == "int4":
        words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=g, dtype=torch.int64).int()
        scale = torch.rand(rows, columns // 64, generator=g).half() * 0.01
        size = torch.tensor(shape, dtype=torch.int64)
        return {"weight_packed": words, "weight_scale": scale, "weight_shape": size}
    if kind == "nvfp4":
        codes = torch.randint(0, 256, (rows, columns // 2), generator=g, dtype=torch.uint8)
        scale = (torch.rand(rows, columns // 16, generator=g) * 400 + 1).to(torch.float8_e4m3fn)
        return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": torch.tensor([2.0**13])}
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    scale = torch.rand(rows, 1, generator=g) * 0.01
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}


ARGS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}, None),
    "nvfp4": (
        "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, None,
    ),
    "fp8": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    ),
}  # fmt: skip


def make(kind: str, sizes: dict[str, Any], folder: Path) -> Path:
    """A compressed-tensors folder of random codes in a llama's shapes."""
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in layers(sizes).items():
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in packed(kind, shape, g).items()}
    width, dtype = sizes["hidden_size"], torch.float16 if kind == "int4" else torch.bfloat16
    tensors["model.embed_tokens.weight"] = torch.randn(sizes["vocab_size"], width, generator=g).to(dtype)
    if not sizes["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(sizes["vocab_size"], width, generator=g).to(dtype)
    for i in range(sizes["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(width, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(width, dtype=dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    form, args, inputs = ARGS[kind]
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **args},
        "input_activations": inputs,
    }
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes,
        "dtype": str(dtype).removeprefix("torch."), "head_dim": width // sizes["num_attention_heads"],
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def copy(source: Path, made: Path, to: Path) -> None:
    """Reads as many bytes as ``source`` has, writes those of ``made``, on the disk."""
    to.mkdir()
    for path in made.iterdir():
        shutil.copyfile(path, to / path.name)
        with (to / path.name).open("rb") as file:
            os.fsync(file.fileno())
    more, buffer = size(source) - size(made), bytearray(1 << 20)
    with (source / "model.safetensors").open("rb", buffering=0) as file:
        while more > 0:
            more -= file.readinto(buffer) or more


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def peak_mb() -> int:
    """Of this process's own memory; getrusage's begins with that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


def measured(source: Path, tiny: Path, target: str, room: Path, repeat: int) -> dict[str, Any]:
    """A process's first conversion, and seconds of conversions and copies in turns."""
    made, beside = room / "made", room / "beside"

    def convert(what: Path) -> dict[str, Any]:
        import nybble

        return nybble.convert(what, made, target)

    start = timed(lambda: convert(tiny))
    shutil.rmtree(made)
    found: dict[str, Any] = {}
    turns = []
    for _ in range(repeat):
        ours = timed(lambda: found.update(convert(source)))
        turns.append((*ours, *timed(lambda: copy(source, made, beside))))
        shutil.rmtree(made)
        shutil.rmtree(beside)
    wall, cpu, copied, copied_cpu = (round(median(each), 3) for each in zip(*turns, strict=True))
    return {
        "bytes_in": found["source_bytes"], "bytes_out": found["bytes"], "turns": repeat,
        "start_seconds": round(start[0], 2), "start_cpu_seconds": round(start[1], 2),
        "seconds": wall, "cpu_seconds": cpu, "copy_seconds": copied, "copy_cpu_seconds": copied_cpu,
        "of_copy": round(median(turn[2] / turn[0] for turn in turns), 3),
        "of_copy_cpu": round(median(turn[3] / turn[1] for turn in turns), 3),
        "load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads(), "rounded": len(found["rounded"]),
        "peak_rss_mb": peak_mb(),
    }  # fmt: skip


def main() -> None:
    """Measure every case; one process a case, so that peaks of memory are its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--target", help="one target alone")
    parser.add_argument("--case", nargs=4, metavar=("A", "TINY", "TARGET", "ROOM"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        source, tiny, target, room = asked.case
        print(json.dumps(measured(Path(source), Path(tiny), target, Path(room), asked.repeat)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as room:
        for name, sizes in MODELS.items():
            if asked.only not in (None, name):
                continue
            sources: dict[str, Path] = {}
            for kind, target in CASES:
                if asked.target not in (None, target):
                    continue
                if kind not in sources:
                    sources[kind] = make(kind, sizes, Path(room, f"{name}-{kind}"))
                tiny = Path(room, f"tiny-{kind}")
                if not tiny.exists():
                    make(kind, TINY, tiny)
                command = [sys.executable, __file__, "--repeat", str(asked.repeat)]
                command += ["--case", str(sources[kind]), str(tiny), target, room]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append({"model": name, "from": kind, "to": target, **json.loads(done.stdout)})
                print(json.dumps(rows[-1]), flush=True)
    new = {(row["model"], row["from"], row["to"]) for row in rows}
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    rows = [row for row in before if (row["model"], row["from"], row["to"]) not in new] + rows
    place = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    RESULT.write_text(
        json.dumps({"command": "python benchmarks/convert_speed.py", **place, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
