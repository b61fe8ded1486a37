"""The ladder's models: two architectures, five sizes each, and how long each trains.

Widths divide by 64 and, from 1M on, so do all inner widths by 128, so that blocks of 16, 32, 64 and 128 weights divide
every matrix. The llamas share their embeddings with the output, and have fewer key heads than query heads from 0.3M on;
the NeoX models have two matrices, biases, and attention beside the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Size:
    """One rung.

    Attributes:
        parameters: without embeddings, declared; what is built has as many within 5 %.
        width, layers, heads: of the residual stream, blocks, query heads.
        keys: key and value heads of the llama. llama, neox: the inner width of its MLP.
        tokens: that it sees in a whole training (25 H100 minutes for all ten).
        batch: windows of 512 tokens in a step. rate: the learning rate's maximum.
        speed: tokens a second of one model alone on an H100, for plans only; ten together took 0.8 of what
            these say (benchmarks/results/ladder.json).
    """

    parameters: float
    width: int
    layers: int
    heads: int
    keys: int
    llama: int
    neox: int
    tokens: float
    batch: int
    rate: float
    speed: float


SIZES = {
    "0.3m": Size(
        parameters=0.3e6, width=64, layers=6, heads=2, keys=1, llama=192, neox=256,
        tokens=60e6, batch=32, rate=4e-3, speed=6e6,
    ),
    "1m": Size(
        parameters=1e6, width=128, layers=5, heads=2, keys=1, llama=384, neox=512,
        tokens=100e6, batch=32, rate=3e-3, speed=5e6,
    ),
    "3m": Size(
        parameters=3e6, width=256, layers=4, heads=4, keys=1, llama=768, neox=896,
        tokens=150e6, batch=64, rate=2e-3, speed=4e6,
    ),
    "10m": Size(
        parameters=10e6, width=384, layers=6, heads=6, keys=3, llama=1024, neox=1408,
        tokens=240e6, batch=64, rate=1.5e-3, speed=2e6,
    ),
    "30m": Size(
        parameters=30e6, width=512, layers=10, heads=8, keys=4, llama=1408, neox=1920,
        tokens=340e6, batch=64, rate=1e-3, speed=1e6,
    ),
}  # fmt: skip
ARCHITECTURES = ("llama", "neox")


def config(architecture: str, size: str, vocabulary: int) -> Any:
    """A transformers config of a rung."""
    from transformers import GPTNeoXConfig, LlamaConfig

    rung = SIZES[size]
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": rung.width, "num_hidden_layers": rung.layers,
        "num_attention_heads": rung.heads, "max_position_embeddings": CONTEXT,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(
            intermediate_size=rung.llama, num_key_value_heads=rung.keys, tie_word_embeddings=True, **common
        )
    return GPTNeoXConfig(intermediate_size=rung.neox, tie_word_embeddings=False, **common)


def build(architecture: str, size: str, vocabulary: int) -> Any:
    """The untrained model; draws from torch's global generator."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # no types
    return auto.from_config(config(architecture, size, vocabulary), attn_implementation="sdpa")


def without_embeddings(model: nn.Module) -> int:
    """How many parameters are neither the input's embedding nor the output's matrix."""
    outer: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        outer |= {id(p) for p in getattr(model, name)().parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outer)


def names(architectures: tuple[str, ...] = ARCHITECTURES, sizes: tuple[str, ...] = tuple(SIZES)) -> list[str]:
    """``llama-0.3m`` and so on, the largest first: they take longest."""
    return [f"{a}-{s}" for s in sorted(sizes, key=lambda s: -SIZES[s].parameters) for a in architectures]


def plan(chosen: list[str], seconds: float, speed: float = 1.0) -> dict[str, int]:
    """Steps of each model so that all together take about so many seconds of one GPU.

    Args:
        chosen: names.
        seconds: for all of them, one after another.
        speed: the machine's, one H100's being 1.

    Returns:
        As many steps as a whole training has, or the same share of it for each model.
    """
    rungs = {name: SIZES[name.split("-", 1)[1]] for name in chosen}
    whole = sum(rung.tokens / (rung.speed * speed) for rung in rungs.values())
    share = min(1.0, seconds / whole)
    return {name: max(1, round(share * rung.tokens / (rung.batch * CONTEXT))) for name, rung in rungs.items()}
