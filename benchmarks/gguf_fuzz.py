"""Damaged GGUF files: whatever the bytes, the reader gives a model's tensors or an error of nybble's own.

    python benchmarks/gguf_fuzz.py --count 10000 --out benchmarks/results/gguf_fuzz.json

A tiny llama is written with weights of many types; each trial changes some bytes (single bits, numbers at their limits,
runs moved, the end cut off), opens the file, reads every tensor and the tokenizer. Another error, or one that takes
memory beyond the file's size many times over, ends the run and names the trial.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nybble.core.errors import NybbleError
from nybble.core.files import atomic_write_json
from nybble.models.gguf.types import writable_types
from nybble.models.gguf.write import Weight, write_gguf
from nybble.models.sources.gguf_tokenizer import build_tokenizer
from nybble.models.sources.open import open_source

LIMITS = (0, 1, 2, 3, 31, 32, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def tiny(path: Path) -> None:
    """A llama of two blocks whose matrices have as many types as there are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    kinds = [kind for kind in writable_types().values() if kind.number != 42]
    weights: dict[str, Weight] = {}
    for number, (name, tensor) in enumerate(LlamaForCausalLM(config).state_dict().items()):
        if name == "lm_head.weight":
            continue
        value: Any = tensor
        if tensor.ndim == 2:
            value = kinds[number % len(kinds)].quantizer.quantize(tensor)
        stored = value if tensor.ndim == 2 else None
        weights[name] = Weight(shape=tuple(tensor.shape), read=partial(lambda v: v, value), stored=stored)
    write_gguf(path, config, weights, tokenizer=tokenizer())


def tokenizer() -> Any:
    """Byte-level BPE with a merge."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|end|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.token_type": [1] * 257 + [3],
        "tokenizer.ggml.eos_token_id": 257,
    }  # fmt: skip
    return build_tokenizer(metadata, Path("x.gguf"))


def damaged(whole: bytes, header: int, draw: random.Random) -> bytes:
    """The bytes with one to four changes, nine of ten in the header."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(header, len(data)) if draw.random() < 0.9 else len(data))
        what = draw.randrange(6)
        if what == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            data[at] = draw.randrange(256)
        elif what == 2:
            width = draw.choice((4, 8))
            data[at : at + width] = (draw.choice(LIMITS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif what == 3:
            size, other = draw.randint(1, 40), draw.randrange(min(header, len(data)))
            data[at : at + size] = data[other : other + size]
        elif what == 4:
            del data[at : at + draw.randint(1, 16)]
        else:
            del data[draw.randrange(at, len(data)) :]
        if not data:
            break
    return bytes(data)


def trial(path: Path) -> str:
    """What came of opening and reading all: ``read``, or the class of nybble's error."""
    try:
        source = open_source(str(path))
        for _ in source.read(list(source.stored())):
            pass
        source.tokenizer()
    except NybbleError as error:
        return type(error).__name__
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        tiny(path)
        whole = path.read_bytes()
        header = whole.index(b"output_norm.weight") + 60
        assert trial(path) == "read"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(options.count):
            path.write_bytes(damaged(whole, header, random.Random(options.seed * 10**9 + number)))
            try:
                found[trial(path)] += 1
            except BaseException:
                print(f"trial {number} of seed {options.seed}")
                raise
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(dict(found), f"memory grew by {grown / 1024:.0f} MiB")
    if options.out:
        results = {"count": options.count, "seed": options.seed, "outcomes": dict(found), "grown_mib": grown // 1024}
        atomic_write_json(options.out, results)


if __name__ == "__main__":
    main()
