"""What a step of the reconstruction engine takes beside the block's own forward and backward.

    python benchmarks/engine.py --out benchmarks/results/engine.json [--device cuda] [--seconds 300]

One window of one block of a random llama with SmolLM2's sizes, 8 x 1024 tokens a step, INT4 in groups of 64 (NVFP4 for
outer scales), for every learned part: the median time of a step as the engine takes it (recorded on a GPU, then
replayed) and with recording switched off, over the median time of the float block's own forward and backward in
bfloat16 on the same inputs, taken the same way (both recorded, or both not). Both engines must come to the same codes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from ptq import PARTS
from run import hardware
from transformers import LlamaConfig, LlamaForCausalLM

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.nn.kinds import quant_modules
from nybble.reconstruction import gradients

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
TOKENS = (8, 1024)
WEIGHTS = {"outer-scales": "nvfp4"}  # INT4 in groups has no scale of its scales


def model(device: str) -> Any:
    """One block of SmolLM2's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=1, vocab_size=512, max_position_embeddings=2048)
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def own(device: str, recorded: bool, rounds: int) -> float:
    """Median seconds of a forward and backward of the float block."""
    made = model(device)
    block, rotary = made.model.layers[0], made.model.rotary_emb
    x = torch.randn(*TOKENS, SIZES["hidden_size"], device=device, dtype=torch.bfloat16)
    places = rotary(x, torch.arange(TOKENS[1], device=device)[None])
    loss = x.float().square().mean()

    def step() -> None:
        for parameter in block.parameters():
            parameter.grad = None
        out = block(x, position_embeddings=places)
        out = out[0] if isinstance(out, tuple) else out
        (out.float() - loss).square().mean().backward()

    if recorded:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step(), step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run: Any = graph.replay
    else:
        run = step
        run()
    return clocked(run, device, rounds)


def clocked(run: Any, device: str, rounds: int) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(rounds):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def learn(part: str, device: str, steps: int, recorded: bool) -> tuple[float, str, bool, Any]:
    """Median seconds of a step, the codes, and whether steps were replayed."""
    taken: list[float] = []
    replayed = 0
    replay = gradients._Recorded.replay
    ran = gradients.Gradients.of

    def timed(self: Any, *args: Any) -> Any:
        wait(device)
        started = time.perf_counter()
        found = ran(self, *args)
        wait(device)
        taken.append(time.perf_counter() - started)
        return found

    def counted(self: Any, *args: Any) -> Any:
        nonlocal replayed
        replayed += 1
        return replay(self, *args)

    options = {**PARTS[part], "steps": steps}
    recipe = {
        "scheme": {"weights": WEIGHTS.get(part, "int4 group=64 symmetric=false")},
        "steps": [{"solver": "rtn"}, {"reconstruction": "mse", "weights": part, **options}],
    }
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 512, (32, TOKENS[1]), generator=generator)
    fewest = contextlib.nullcontext() if recorded else mock.patch.object(gradients, "FEWEST", 1 << 30)
    with (
        fewest,
        mock.patch.object(gradients.Gradients, "of", timed),
        mock.patch.object(gradients._Recorded, "replay", counted),
    ):
        done, report = nybble.quantize(model(device), recipe, data, settings={"batch": TOKENS[0], "seq_len": TOKENS[1]})
    codes = {
        f"{name}.{key}": tensor.cpu()
        for name, module in quant_modules(done)
        for key, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    notes = report.layers[0].notes[-1]
    return statistics.median(taken[5:]), notes, replayed > 0, codes


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    cuda, began = options.device == "cuda", time.perf_counter()
    base = {False: own(options.device, False, 10)}
    if cuda:
        base[True] = own(options.device, True, 10)
    rows: list[dict[str, Any]] = []
    found = {
        "hardware": hardware(options.device), "versions": versions(), "tokens": TOKENS,
        "steps": options.steps, "own_seconds": {("recorded" if k else "eager"): v for k, v in base.items()},
        "rows": rows,
    }  # fmt: skip
    for part in PARTS:
        if time.perf_counter() - began > options.seconds:
            break
        row: dict[str, Any] = {"part": part}
        codes = []
        for recorded in base:
            seconds, note, replayed, made = learn(part, options.device, options.steps, recorded)
            name = "recorded" if recorded else "eager"
            row[name] = {"seconds": seconds, "over_own": round(seconds / base[recorded], 2), "note": note}
            if recorded:
                row[name]["replayed"] = replayed
            codes.append(made)
        row["same"] = all(torch.equal(codes[0][n], c[n]) for c in codes for n in codes[0])
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out is not None:
            atomic_write_json(options.out, found)


if __name__ == "__main__":
    main()
