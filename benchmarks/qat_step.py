"""What a step of quantization-aware training takes beside the same step of the float model.

    python benchmarks/qat_step.py --device cuda --seconds 120 --out benchmarks/results/qat_step.json

A random llama of SmolLM2's sizes, 8 x 1024 tokens: forward, backward and AdamW (torch's fused), with 4-bit weights a
row and 4-bit inputs a tensor after LSQ, over the same step of the model as it is; weights of bfloat16, and of float32
multiplied in bfloat16 (``mixed``). Both steps are run alike:

    eager       operation by operation
    graph       the whole step recorded into a CUDA graph, without a compiler
    blocks      eager, with each block through torch.compile: what is compiled for one serves all
    compiled    forward and loss through torch.compile; takes minutes of compiling
    recorded    that, recorded into CUDA graphs by torch (``reduce-overhead``)

Steps of the two take turns; the ratio is the median over the turns. What ``--seconds`` leaves no time for is named.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.training.prepare import prepare

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "W4A4 LSQ": (
        {"weights": "int4_full channel scale=learned", "inputs": "int4 tensor static scale=learned"},
        {"weights": "lsq", "inputs": "lsq"},
    ),
    "W4A4 of tokens, ste": ({"weights": "int4 channel", "inputs": "int4 token"}, {}),
}
MODES = ("eager", "graph", "blocks", "compiled", "recorded")


def model(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """SmolLM2's shape, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_hidden_layers=options.layers, vocab_size=options.vocabulary, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device(options.device):
        return LlamaForCausalLM(config).to(dtype).train()


def step_of(net: Any, ids: torch.Tensor, mode: str, mixed: bool) -> Callable[[], None]:
    """A whole step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=ids.is_cuda, capturable=mode == "graph")

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16) if mixed else nullcontext():
            found: torch.Tensor = net(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found

    forward: Any = loss_of
    if mode == "blocks":
        for block in net.model.layers:
            block.compile(fullgraph=True)
    elif mode in ("compiled", "recorded"):
        forward = torch.compile(loss_of, fullgraph=True, mode="reduce-overhead" if mode == "recorded" else None)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return recorded(step) if mode == "graph" else step


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph, with the memory that it was recorded with."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    replay.keeps = step  # type: ignore[attr-defined]  # the graph reads the network and the states in its closure
    return replay


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one."""
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def row_of(options: argparse.Namespace, ids: torch.Tensor, name: str, mixed: bool, mode: str) -> dict[str, Any]:
    """One scheme, one way."""
    torch.compiler.reset()
    scheme, parts = SCHEMES[name]
    dtype = torch.float32 if mixed else torch.bfloat16
    row = {"scheme": name, "weights": "float32, mixed" if mixed else "bfloat16", "mode": mode}
    began = time.perf_counter()
    twin = prepare(model(options, dtype), scheme, parts, run=lambda net: net(input_ids=ids[:1])).train()
    try:
        steps = [step_of(net, ids, mode, mixed) for net in (model(options, dtype), twin)]
        for _ in range(3):
            [timed(step, options.device) for step in steps]
    except RuntimeError as error:  # other ways are measured all the same
        return {**row, "failed": str(error).split("\n")[0][:300]}
    warm = time.perf_counter() - began
    turns = [[timed(step, options.device) for step in steps] for _ in range(options.turns)]
    return {
        **row, "ratio": statistics.median(low / plain for plain, low in turns),
        "float_ms": 1e3 * statistics.median(plain for plain, _ in turns),
        "ms": 1e3 * statistics.median(low for _, low in turns), "warm_up_seconds": round(warm, 1),
    }  # fmt: skip


def main() -> None:
    """Measure each way, all schemes of it; print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 1024), help="sequences, and tokens of one")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--modes", nargs="+", default=MODES[:3], choices=MODES)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing is begun behind them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    ids = torch.randint(options.vocabulary, tuple(options.tokens), device=options.device)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(), "tokens": list(options.tokens), "rows": rows,
        "layers": options.layers, "left out": left,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
    }  # fmt: skip
    for mode in options.modes:
        if mode == "graph" and options.device == "cpu":
            continue
        for mixed in (False, True):
            for name in options.schemes:
                if time.perf_counter() - began > options.seconds:
                    left.append(f"{mode}, {name}, {'mixed' if mixed else 'bfloat16'}")
                else:
                    rows.append(row_of(options, ids, name, mixed, mode))
                    print(rows[-1], flush=True)
                if options.out:
                    atomic_write_json(options.out, result)


if __name__ == "__main__":
    main()
