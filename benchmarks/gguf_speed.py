"""Seconds to write a GGUF from codes, beside a copy of the same file in the same run.

    python benchmarks/gguf_speed.py --out benchmarks/results/gguf_speed.json

A llama of 1.1B weights (TinyLlama's shape) with random blocks, all matrices of one type. ``write``: from QTensors in
memory (what an exported folder's are once they are read) to the file; ``convert``: from that file to another, decoded
to QTensors and encoded again; ``copy``: ``shutil.copyfile`` and fsync, as both writes end with. Copies stand before and
after; CPU seconds are beside wall-clock ones, which other work on the machine moves. ``round``: megabytes of bfloat16 a
CPU second that become the type from float weights, by the search of ``scale=least-squares``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.core.files import atomic_write_json
from nybble.models.gguf.of_source import weights_of
from nybble.models.gguf.types import block_type, decode, encode
from nybble.models.gguf.write import Weight, write_gguf
from nybble.models.sources.open import open_source
from nybble.qtensor import from_spec


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}


def copy(source: Path, dest: Path) -> None:
    """To the disk."""
    shutil.copyfile(source, dest)
    with dest.open("rb") as file:
        os.fsync(file.fileno())
    dest.unlink()


def random_weights(config: LlamaConfig, name: str) -> dict[str, Weight]:
    """Every matrix as codes of a type, one tensor for each shape; norms of ones."""
    kind = block_type(name)
    few = encode(kind, kind.quantizer.quantize(torch.randn(16, 2048))).numpy().reshape(-1, kind.nbytes)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in LlamaForCausalLM(config).state_dict().items()}
    made: dict[tuple[int, ...], Any] = {}
    found = {}
    for key, shape in shapes.items():
        if len(shape) == 2 and shape not in made:
            count = shape[0] * shape[1] // kind.block
            made[shape] = decode(kind, np.resize(few, (count, kind.nbytes)), shape)
        value: Any = made[shape] if len(shape) == 2 else torch.ones(shape)
        stored = None
        if len(shape) == 2:
            stored = from_spec(value.spec(), {name: tensor.to("meta") for name, tensor in value.tensors().items()})
        found[key] = Weight(shape=shape, read=partial(lambda v: v, value), stored=stored)
    return found


def measure(name: str, folder: Path, layers: int) -> dict[str, Any]:
    """A type."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    path, other = folder / "a.gguf", folder / "b.gguf"
    weights = random_weights(config, name)
    write = timed(lambda: write_gguf(path, config, weights))
    before = timed(lambda: copy(path, other))
    write = min(write, timed(lambda: write_gguf(path, config, weights)), key=lambda each: each["seconds"])
    source = open_source(str(path))
    convert = timed(lambda: write_gguf(other, source.config, weights_of(source)))
    after = timed(lambda: copy(path, other))
    kind = block_type(name)
    rows = torch.randn(512, 2048) * 0.02
    kind.quantizer.fit(rows[:32])
    rounding = timed(lambda: encode(kind, kind.quantizer.quantize(rows)))
    copied = min(before["seconds"], after["seconds"])
    return {
        "bytes": path.stat().st_size, "write": write, "convert": convert, "copies": [before, after],
        "write_over_copy": round(copied / write["seconds"], 3),
        "convert_over_copy": round(copied / convert["seconds"], 3),
        "round_mb_per_cpu_second": round(2e-6 * rows.numel() / max(rounding["cpu_seconds"], 1e-3), 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="q8_0,q4_k,q6_k,q4_0")
    parser.add_argument("--layers", type=int, default=22)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types.split(","):
            results[name] = measure(name, Path(folder), options.layers)
            print(name, results[name], flush=True)
            found = {"threads": torch.get_num_threads(), "layers": options.layers, "load": os.getloadavg()[0]}
            atomic_write_json(options.out, found | {"results": results})


if __name__ == "__main__":
    main()
