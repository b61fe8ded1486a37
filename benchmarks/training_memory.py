"""Memory of training steps by part, beside what the allocator says.

    python benchmarks/training_memory.py --device cuda --out benchmarks/results/training_memory.json
    python benchmarks/training_memory.py --device cpu --tiny --out FILE

Two kinds of runs, each of two steps, of which the second (its states are there) is in the table:

- all weights of a llama of 0.5B parameters in bfloat16 by torch's AdamW and by ours in 8 and 4 bits, paged and not;
- QLoRA of a llama in the shape of LLaMA 65B: random weights are packed (NF4, double quantization) on the device layer
  by layer, LoRA of rank 64 (float32) on every linear layer but the head, gradients checkpointed, one sequence of 528
  tokens (Dettmers et al. 2023: 16 of a source, 512 of a target), AdamW in 32 bits, paged.

Bytes: ``parts`` from model, optimizer and autograd; ``requested``, ``allocated`` and ``peak`` from torch's allocator
(on the CPU from the storages that operations make); ``workspaces`` are cuBLAS's, measured before; ``other`` is what was
requested and is in none of these. The script fails where that is more than one per cent, or where the 65B run takes
more than 48 GB at any moment, making the model included.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nybble.optim
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.nn.linear import QuantLinear
from nybble.nn.swap import set_module
from nybble.quantizer import Quantizer
from nybble.scheme import parse_scheme
from nybble.training.memory import Moment, measure_step
from nybble.training.methods import Given
from nybble.training.methods.qlora import PART, QloraOptions

GB = 10**9
MOST = 48 * GB
LLAMA_65B = {
    "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_HALF = {
    "vocab_size": 32000, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
OPTIMIZERS = ("torch.AdamW", "AdamW8bit", "AdamW4bit", "Factor4bit", "PagedAdamW8bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="both models of three small layers, to try the script")
    parser.add_argument("--tokens", type=int, default=528, help="of the sequence")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters")
    parser.add_argument("--only", choices=("all weights", "qlora"), default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(options.device), "versions": versions(), "tokens": options.tokens}
    result["workspaces"] = workspaces(options.device)
    if options.only != "qlora":
        result["all weights"] = {name: all_weights(name, options) for name in OPTIMIZERS}
    if options.only != "all weights":
        result["qlora"] = qlora(options)
    for run in runs(result).values():
        for row in run["moments"]:
            row["other"] -= result["workspaces"]
    atomic_write_json(options.out, result)
    problems = unaccounted(result) + too_much(result)
    print("\n".join(problems) or f"{options.out}: every byte has its part, to one per cent")
    sys.exit(bool(problems))


def sized(sizes: dict[str, int | bool], options: Any) -> Any:
    small = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 4} if options.tiny else {}
    made: Any = LlamaConfig
    return made(**{**sizes, **small})


def all_weights(name: str, options: Any) -> dict[str, Any]:
    """Every weight trains."""
    gc.collect()
    config = sized(LLAMA_HALF, options)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM(config).bfloat16().train()
    kind = torch.optim.AdamW if name == "torch.AdamW" else getattr(nybble.optim, name)
    return stepped(name, model, kind(model.parameters(), lr=1e-4), config, options)


def qlora(options: Any) -> dict[str, Any]:
    """Adapters beside packed weights."""
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = sized(LLAMA_65B, options)
    began = time.perf_counter()
    model: Any = packed_llama(config, options.device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = QloraOptions(rank=options.rank, dropout=0.05)
    model = PART.attach(model, Given(options=settings, scheme=parse_scheme({"weights": "nf4-bnb-dq"}))).train()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = nybble.optim.PagedAdamW32bit(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    found = stepped("qlora", model, optimizer, config, options)
    base = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    adapters = sum(p.numel() for p in trained)
    numbers = {"packed_weights": base, "adapters": adapters, "making_peak": peak, "making_seconds": round(seconds, 1)}
    return found | numbers


def packed_llama(config: Any, device: str) -> nn.Module:
    """A llama of random weights, whose linear layers but the head are packed as soon as they are made."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).bfloat16()
    line, draw = Quantizer("nf4-bnb-dq"), torch.Generator(device).manual_seed(0)

    def noise(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=draw)

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = line.quantize(noise(layer.weight.shape, torch.bfloat16).float())
            set_module(model, name, QuantLinear(weight).standing_for(torch.bfloat16))
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        made = torch.ones(p.shape, dtype=p.dtype, device=device) if p.dim() == 1 else noise(p.shape, p.dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise AssertionError("a tensor was left on the meta device")
    return model


def stepped(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any, options: Any) -> dict[str, Any]:
    """Two steps on random tokens; the second one's moments."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, options.tokens), generator=draw).to(options.device)
    asked: Any = model
    losses, peaks, moments = [], [], list[Moment]()

    def evaluated() -> torch.Tensor:
        loss: torch.Tensor = asked(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    for _ in range(2):
        began = time.perf_counter()
        moments, loss = measure_step(model, optimizer, evaluated)
        seconds = time.perf_counter() - began
        losses.append(round(loss, 4))
        peaks.append(max(moment.peak for moment in moments))
    rows = [asdict(moment) | {"other": moment.other} for moment in moments]
    print(f"{name}: losses {losses}, peak {max(peaks) / GB:.3f} GB", flush=True)
    for row in rows:
        parts = ", ".join(f"{part} {size / GB:.3f}" for part, size in row["parts"].items())
        rest = ", ".join(f"{what} {row[what] / GB:.3f}" for what in ("other", "allocated", "peak", "host"))
        print(f"    {row['name']}: {parts}, {rest}", flush=True)
    facts = {"moments": rows, "peak": max(peaks), "losses": losses, "seconds_of_second_step": round(seconds, 2)}
    return facts | {"parameters": config_size(config)}


def config_size(config: Any) -> int:
    """Parameters of the float model."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


def workspaces(device: str) -> int:
    """Bytes that cuBLAS takes at its first products and keeps, in forward and in backward."""
    if device != "cuda":
        return 0
    for dtype in (torch.bfloat16, torch.float32):
        x, w = (torch.ones(256, 256, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        torch.autograd.backward((x @ w).sum())
    del x, w
    torch.cuda.synchronize()
    found: int = torch.cuda.memory_stats()["requested_bytes.all.current"]
    return found


def runs(result: dict[str, Any]) -> dict[str, Any]:
    """By name."""
    return {**result.get("all weights", {}), **({"qlora": result["qlora"]} if "qlora" in result else {})}


def unaccounted(result: dict[str, Any]) -> list[str]:
    """Moments of which more than one per cent is in no part."""
    return [
        f"{name}, {row['name']}: {row['other']} of {row['requested']} bytes are in no part"
        for name, run in runs(result).items()
        for row in run["moments"]
        if abs(row["other"]) > 0.01 * row["requested"]
    ]


def too_much(result: dict[str, Any]) -> list[str]:
    """Whether the 65B run took more than 48 GB."""
    run = result.get("qlora", {"peak": 0, "making_peak": 0})
    peak = max(run["peak"], run["making_peak"] or 0)
    return [f"qlora: {peak} bytes at once; {MOST} were promised"] if peak > MOST else []


def machine(device: str) -> dict[str, Any]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"gpu": properties.name, "memory": properties.total_memory}
    return {"cpu": platform.processor(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
