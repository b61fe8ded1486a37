"""Peak memory of `nybble quantize` against its own estimate: python benchmarks/memory.py (20 minutes on two cores).

Each case runs in a process of its own. Measured is the process's largest resident set (VmHWM of Linux), less that of a
process that imported torch and multiplied two matrices. The 1.1B llama has TinyLlama's shape and random weights; it is
written to a temporary folder shard by shard. Result: benchmarks/results/memory.json, which docs/memory.md quotes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "memory.json"
NVFP4 = ["--scheme", "NVFP4"]
# The peak is reached in every block alike: four of them are enough for the method that takes longest.
FOUR = ["--ignore", r"re:model\.layers\.([4-9]|1\d|2\d)\..*"]
CASES: list[tuple[str, str, str, list[str], int, int]] = [  # model, recipe, note, options, samples, tokens in each
    ("demo:smollm2", "rtn", "", [], 16, 512),
    ("demo:smollm2", "minmax-fp", "W4A4", [], 16, 512),
    ("demo:smollm2", "gptq", "", [], 16, 512),
    ("demo:smollm2", "gptq", "NVFP4", NVFP4, 64, 512),
    ("llama-1.1b", "rtn", "", [], 8, 256),
    ("llama-1.1b", "minmax-fp", "W4A4", [], 8, 256),
    ("llama-1.1b", "gptq", "4 of 22 blocks", FOUR, 4, 256),
    ("llama-1.1b", "gptq", "NVFP4, 4 of 22 blocks", [*NVFP4, *FOUR], 8, 256),
]
SIZES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip

PEAK = """
def peak():  # not ru_maxrss: a process inherits that from the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
"""
# Triton, where it is installed, comes with what transformers imports of torch.
BASE = (
    PEAK
    + """
import importlib.util
import torch
if importlib.util.find_spec("triton"):
    import triton
torch.ones(256, 256) @ torch.ones(256, 256)
print(peak())
"""
)
RUN = (
    PEAK
    + """
import json, sys
from nybble.walk.job import Job
from nybble.cli import build
kept = []
make = Job.make
Job.make = staticmethod(lambda *args, **options: kept.append(make(*args, **options)) or kept[0])
build()(sys.argv[1:], standalone_mode=False)
print(json.dumps({"peak": peak(), "estimate": kept[0].estimate.memory}), file=sys.stderr)
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this; other rows of the result stay")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    base = measure_base()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        llama = Path(folder) / "llama-1.1b"
        for number, (model, recipe, note, extra, samples, seq_len) in enumerate(CASES):
            name = {"model": model, "recipe": recipe, "note": note, "samples": samples, "seq_len": seq_len}
            if options.only not in f"{model} {recipe} {note}":
                continue
            if model == "llama-1.1b" and not llama.exists():
                write_llama(llama, SIZES)
            spec = str(llama) if model == "llama-1.1b" else model
            sizes = ["--samples", str(samples), "--seq-len", str(seq_len)]
            found = measure(["quantize", spec, f"{folder}/out{number}", "--recipe", recipe, *extra, *sizes])
            above = found["peak"] - base
            row = {"measured": above, "estimate": found["estimate"], "ratio": round(found["estimate"] / above, 3)}
            result["rows"] = [r for r in result["rows"] if r.items() & name.items() != name.items()] + [name | row]
            print(json.dumps(name | row), flush=True)
            write(options.out, result | facts(base))


def facts(base: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    machine = {"cpu": processor(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"base": base, "machine": machine, "versions": versions}


def write(path: Path, result: dict[str, Any]) -> None:
    """The rows in the order of CASES."""
    order = [case[:3] for case in CASES]
    result["rows"].sort(key=lambda row: order.index((row["model"], row["recipe"], row["note"])))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def measure_base() -> int:
    """Peak bytes of a process that does nothing but import torch."""
    return int(subprocess.run([sys.executable, "-c", BASE], check=True, capture_output=True, text=True).stdout)


def measure(arguments: list[str]) -> dict[str, int]:
    """Run a command in a process of its own; its peak and its estimate in bytes."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, int] = json.loads(done.stderr.strip().splitlines()[-1])
    return found


def processor() -> str:
    """The processor's name, where Linux says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_llama(folder: Path, sizes: dict[str, Any]) -> None:
    """A llama of random bfloat16 weights, a shard a block, with a tokenizer of the builtin text's words."""
    import torch
    from transformers import LlamaConfig

    from nybble.core.tensorfile import write_tensorfile

    config: Any = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    layers, width, inner, words = (
        config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    )  # fmt: skip
    narrow = config.num_key_value_heads * config.head_dim

    def noise(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    where: dict[str, str] = {}
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width), "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    for layer in range(layers + 1):
        if layer == layers:
            tensors = {"model.embed_tokens.weight": noise(words, width), "lm_head.weight": noise(words, width)}
            tensors["model.norm.weight"] = torch.ones(width).bfloat16()
        else:
            tensors = {f"model.layers.{layer}.{n}.weight": noise(*shape) for n, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width).bfloat16()
        name = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        write_tensorfile(folder / name, tensors, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    write_tokenizer(folder, words)


def write_tokenizer(folder: Path, size: int) -> None:
    """A word-level tokenizer of the builtin text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from nybble.data import load_text

    text = " ".join(load_text("builtin", "calibration").documents)
    words = ["<unk>", "<s>", "</s>", *sorted(set(text.split()))][:size]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
