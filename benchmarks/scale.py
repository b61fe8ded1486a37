"""Large models: seconds and memory of a whole run, from a few blocks of the shape, on one GPU and on several.

    python benchmarks/scale.py --device cuda [--blocks 3] [--cases gptq best nvfp4] [--ranks 2] [--shape 8b]
    python benchmarks/scale.py --device cuda --shape 70b --blocks 1 --cases gptq

Makes a random llama of the shape (bfloat16 weights in safetensors shards of up to 5 GB, under --work) with --blocks of
its blocks, and quantizes it from that folder into another one, on --samples x --seq-len random token ids, each case in
a process of its own; with --ranks N also by torchrun with N GPUs, after the run with one. Measured are the whole
command and, through its progress, every block; peak memory that torch allocated on the GPU (there is nothing before:
blocks stream), and the process's largest resident set. A block is the median of those after the first, which sets
libraries up. With fewer blocks than the shape has, "whole" is an extrapolation and the record says so: what comes
before and after the blocks as measured (what comes after, mostly writing, in proportion to the bytes of the result),
the first block once, and the block for all others. "phases" are seconds of the median block by what they went to, the
device waited for. Before anything the shape's own pre-flight lines, from files of the right size that hold nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pkgutil
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

RESULT = Path(__file__).parent / "results" / "scale.json"
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"recipe": "gptq", "weights": "int4 group=128 symmetric=false"},
    "gptq-g64": {"recipe": "gptq", "weights": "int4 group=64 symmetric=false"},
    "best": {"recipe": "best-w4a16"},
    "nvfp4": {"recipe": "best-nvfp4"},
}
COMMON = {"vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": COMMON | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": COMMON | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip
SHARD = 5_000_000_000
PHASES = {
    "load": "nybble.walk.lane.Lane.load",
    "see and solve": "nybble.walk.steps.solver.SolverStep.run",
    "see": "nybble.walk.steps.solver.see_block",
    "solve": "nybble.walk.steps.solver.SolverStep._solved",
    "learn": "nybble.walk.steps.reconstruction.ReconstructionStep.run",
    "finish and report": "nybble.walk.lane.Lane.finish",
    "move on": "nybble.walk.lane.Lane.advance",
    "write": "nybble.walk.lane.Lane.write",
    "release": "nybble.walk.lane.Lane.release",
}


class Clock:
    """Progress that notes when each block was finished, and what its seconds went to."""

    def __init__(self, device: str) -> None:
        self.device, self.marks, self.spent = device, list[float](), list[dict[str, float]]()
        self.started = time.perf_counter()
        self._now: dict[str, float] = {}

    def wait(self) -> float:
        """The time, with the device done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, total: int, what: str) -> None:
        """The blocks begin."""
        self.marks.append(self.wait())
        self._now = {}

    def advance(self, n: int = 1, note: str = "") -> None:
        """Blocks are done."""
        self.marks.append(self.wait())
        self.spent.append(self._now)
        self._now = {}

    def done(self) -> None:
        """The end of the blocks and of what is outside."""

    def timed(self, name: str, function: Any) -> Any:
        """A function whose seconds count as a phase."""

        def run(*args: Any, **options: Any) -> Any:
            began = self.wait()
            try:
                return function(*args, **options)
            finally:
                self._now[name] = self._now.get(name, 0.0) + self.wait() - began

        return run


def write_model(folder: Path, shape: str, blocks: int, device: str, empty: bool = False) -> None:
    """A random llama with the shape's sizes and ``blocks`` blocks; ``empty``: files of the right size alone."""
    from transformers import LlamaConfig

    from nybble.core.tensorfile import write_tensorfile

    config: Any = LlamaConfig(
        **SHAPES[shape] | {"num_hidden_layers": blocks}, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    config.save_pretrained(folder)
    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    narrow = config.num_key_value_heads * (width // config.num_attention_heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for layer in range(blocks):
        own = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width),
            "self_attn.v_proj": (narrow, width), "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in own.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in shapes.items():
        if sum(2 * torch.Size(s).numel() for s in (*shards[-1].values(), size)) > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = size
    where: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(0)
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(shard, file)
        if empty:
            _write_empty(folder / file, shard)
            continue
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
            for name, size in shard.items()
        }
        write_tensorfile(folder / file, tensors, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _write_empty(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose data is a hole."""
    header, end = dict[str, Any](), 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def ids_of(options: argparse.Namespace) -> torch.Tensor:
    """Random token ids [samples, seq_len]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        3, SHAPES[options.shape]["vocab_size"], (options.samples, options.seq_len), generator=generator
    )


def settings_of(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Of a run."""
    return {"batch": options.batch, "seq_len": options.seq_len, "device": device}


def preflight(options: argparse.Namespace, case: str, folder: Path) -> list[str]:
    """What nybble says before a run of the whole shape; of one that can't be, why."""
    import nybble

    asked = {key: value for key, value in CASES[case].items() if key != "recipe"}
    try:
        return nybble.preflight(
            folder, CASES[case]["recipe"], ids_of(options), settings=settings_of(options, options.device),
            out=folder / "out", **asked,
        )  # fmt: skip
    except nybble.NybbleError as error:
        return [str(error)]


def child(options: argparse.Namespace) -> None:
    """One run in this process, one of several if torchrun started it; the first writes a record."""
    import nybble
    from nybble.core import ranks
    from nybble.core.memory import resident_memory

    with ranks.started(options.device) as device, clocking(device) as clock:
        if device.startswith("cuda"):
            torch.linalg.cholesky(torch.eye(8, device=device))  # libraries that are loaded once
            torch.cuda.reset_peak_memory_stats()
        out = options.work / "out"
        asked = {key: value for key, value in CASES[options.child].items() if key != "recipe"}
        held = resident_memory()  # the estimate is of what comes above it
        clock.started = clock.wait()
        nybble.quantize(
            options.work / f"{options.shape}-{options.blocks}", CASES[options.child]["recipe"], ids_of(options),
            out=out, settings=settings_of(options, device), progress=clock, **asked,
        )  # fmt: skip
        whole = clock.wait() - clock.started
        if os.environ.get("RANK", "0") == "0":
            found = record(options, clock, whole, device) | {"host_before_gb": round(held / 1e9, 2)}
            options.record.write_text(json.dumps(found))


@contextlib.contextmanager
def clocking(device: str) -> Iterator[Clock]:
    """A clock, with all phases timed by it."""
    clock = Clock(device)
    with contextlib.ExitStack() as stack:
        for name, place in PHASES.items():
            stack.enter_context(mock.patch(place, clock.timed(name, pkgutil.resolve_name(place))))
        yield clock


def record(options: argparse.Namespace, clock: Clock, whole: float, device: str) -> dict[str, Any]:
    """What was measured."""
    total = SHAPES[options.shape]["num_hidden_layers"]
    seconds = [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)][: options.blocks]
    block = statistics.median(seconds[1:] or seconds)
    typical = min(range(len(seconds)), key=lambda n: abs(seconds[n] - block) + (n == 0 and len(seconds) > 1) * 1e9)
    before, after = clock.marks[0] - clock.started, clock.started + whole - clock.marks[options.blocks]
    found = {
        "seconds_a_block": round(block, 3),
        "seconds_of_blocks": [round(s, 3) for s in seconds],
        "seconds_before": round(before, 2),
        "seconds_after": round(after, 2),
        "seconds_measured": round(whole, 2),
        "whole": round(before + seconds[0] + block * (total - 1) + after * larger(options), 1),
        "whole_is": "measured" if options.blocks == total else f"extrapolated from {options.blocks} of {total} blocks",
        "phases": {name: round(s, 3) for name, s in clock.spent[typical].items()},
        "peak_host_gb": round(peak_host() / 1e9, 2),
    }
    if device.startswith("cuda"):
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        found["reserved_gpu_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return found


def larger(options: argparse.Namespace) -> float:
    """How many times larger the result of all blocks is than the one of those that were made."""
    shape = SHAPES[options.shape]
    beside = 2 * 2 * shape["vocab_size"] * shape["hidden_size"]  # embedding and head in bfloat16
    size = sum(path.stat().st_size for path in (options.work / "out").glob("*.safetensors"))
    return (beside + (size - beside) / options.blocks * shape["num_hidden_layers"]) / size


def peak_host() -> int:
    """The process's largest resident set in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(options: argparse.Namespace, case: str, count: int) -> dict[str, Any]:
    """One case with so many GPUs, in processes of its own."""
    result = options.work / "record.json"
    result.unlink(missing_ok=True)
    for left in ("out", "out.partial"):
        shutil.rmtree(options.work / left, ignore_errors=True)
    launcher = [sys.executable]
    if count > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    given = {
        "--device": options.device, "--shape": options.shape, "--blocks": options.blocks, "--samples": options.samples,
        "--seq-len": options.seq_len, "--batch": options.batch, "--work": options.work, "--child": case,
        "--record": result,
    }  # fmt: skip
    done = subprocess.run([*launcher, __file__, *(str(x) for pair in given.items() for x in pair)], check=False)
    if done.returncode or not result.exists():
        return {"failed": f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if options.keep_out:
        (options.work / "out").rename(options.work / f"{case}-{count}")
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--blocks", type=int, help="how many are made and quantized; left out: as the shape has")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["gptq", "best", "nvfp4"])
    parser.add_argument("--ranks", type=int, default=1, help="also with so many GPUs, by torchrun")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, help="a folder for the model and results; left out: a temporary one")
    parser.add_argument("--keep-out", action="store_true", help="leave the quantized folders in --work")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.blocks = options.blocks or SHAPES[options.shape]["num_hidden_layers"]
    return options


def main() -> None:
    """Make the model, measure every case, write after each."""
    options = arguments()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory(prefix="nybble-scale-") as temporary:
        options.work = options.work or Path(temporary)
        options.work.mkdir(parents=True, exist_ok=True)
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """All cases."""
    sys.path.insert(0, str(Path(__file__).parent / "quality"))
    from run import hardware

    from nybble.core.files import atomic_write_json
    from nybble.core.versions import versions

    model, shape = options.work / f"{options.shape}-{options.blocks}", options.work / f"{options.shape}-empty"
    began = time.perf_counter()
    if not model.exists():
        write_model(model, options.shape, options.blocks, options.device)
    made = time.perf_counter() - began
    if not shape.exists():
        write_model(shape, options.shape, SHAPES[options.shape]["num_hidden_layers"], "cpu", empty=True)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": []}
    for case in options.cases:
        row: dict[str, Any] = {
            "shape": options.shape, "case": case, **CASES[case], "calibration": [options.samples, options.seq_len],
            "batch": options.batch, "blocks": options.blocks, "preflight": preflight(options, case, shape),
            "seconds_to_make_the_model": round(made, 1), "hardware": hardware(options.device.partition(":")[0]),
            "versions": versions(),
        }  # fmt: skip
        print(json.dumps({"case": case, "preflight": row["preflight"]}), flush=True)
        for count in sorted({1, options.ranks}):
            row[f"ranks {count}"] = run(options, case, count)
            print(json.dumps({"case": case, "ranks": count, **row[f"ranks {count}"]}), flush=True)
        one, more = row["ranks 1"], row[f"ranks {options.ranks}"]
        if options.ranks > 1 and "whole" in one and "whole" in more:
            row["ratio a block"] = round(one["seconds_a_block"] / more["seconds_a_block"], 3)
            row["ratio whole"] = round(one["whole"] / more["whole"], 3)
            print(json.dumps({k: row[k] for k in ("case", "ratio a block", "ratio whole")}), flush=True)
        same = ("shape", "case", "hardware")
        known["rows"] = [r for r in known["rows"] if any(r[k] != row[k] for k in same)] + [row]
        atomic_write_json(options.out, known)


if __name__ == "__main__":
    main()
