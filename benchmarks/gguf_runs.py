"""llama.cpp runs GGUF files that nybble wrote: greedy text and perplexity beside nybble's own, and where they part.

    pip install --target PEER xllamacpp libggml-python
    PYTHONPATH=PEER python benchmarks/gguf_runs.py --out benchmarks/results/gguf_runs.json  # adds to what is there

SmolLM2-135M-Instruct, and the ladder's llama of 30M weights, are written as each type and run by llama.cpp
(:mod:`benchmarks.llama_cpp`, one thread, keys and values in float32, attention not fused); nybble's side is the same
file opened by nybble, in float32. For each type:

``float inputs``: nybble's products take inputs as they are. llama.cpp's CPU products with quantized weights don't: they
round them to eight bits in blocks of 32 or 256. So the same values are also written as F32 (``values as f32``), where
llama.cpp rounds nothing: text and perplexity then have to be equal.
``rounded inputs``: nybble's products round their inputs as llama.cpp's do.
``products``: each product of a run over a prompt, computed by nybble from the inputs that llama.cpp had: relative
differences of outputs, with inputs rounded and not.
``llama.cpp with float16 keys and values`` against llama.cpp with float32 ones: what it takes to part two runs that
round their inputs. Rounding is a step function, so the smallest difference in front of it is a whole step behind it for
some inputs, and thirty layers of that are another draw of the same noise.

A text is the same as long as the model, given the tokens so far, would choose the same next one. Where they part
(``parted``): the token, nybble's lead of its choice over the other's and llama.cpp's of its own, in logits, beside the
root mean square by which the two's logits differ over the text so far.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from benchmarks.llama_cpp import LlamaCpp, Product

from nybble.core.files import atomic_write_json
from nybble.data.sources.builtin import split_topics
from nybble.models.build.config_file import read_json
from nybble.models.gguf.metadata import arch_for, gguf_name
from nybble.models.gguf.mixes import FLOATS
from nybble.models.gguf.of_source import weights_of
from nybble.models.gguf.types import block_type, decode
from nybble.models.gguf.write import Weight, write_gguf
from nybble.models.sources.open import open_source
from nybble.quantizer import Quantizer

PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n",
    "Once upon a time, there was", "The three states of matter are", "In Python, a list is",
    "The largest planet of the solar system", "To make tea, first",
)  # fmt: skip
INPUTS = {
    32: "int8 group=32 scale_format=float16 raw_scale=true reciprocal=true",  # Q8_0, Q8_1
    256: "int8 group=256 scale_format=float32 reciprocal=true",  # Q8_K
}
"""What llama.cpp's CPU products round their inputs to, by the block of the weight's type.

Codes are those of its own ``from_float`` on x86 (ties to even; ggml's portable code takes them away from zero) but for
one in a million: it multiplies by 127 / max, here by 1 / (max / 127)."""


def rounding_of(kind: str) -> Quantizer | None:
    """Of the inputs of products with weights of a type; None: there is none."""
    return None if kind in FLOATS else Quantizer(INPUTS[256 if block_type(kind).block == 256 else 32])


def round_inputs(model: Any, types: Mapping[str, str]) -> None:
    """Let the products of a float model round their inputs as llama.cpp does under weights of these types."""
    arch = arch_for(model.config)[1]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            at = "token_embd.weight" if name == "lm_head" else gguf_name(f"{name}.weight", arch)
            quantizer = rounding_of(types.get(str(at), types.get("output.weight", "F32")))
            if quantizer is not None:
                module.register_forward_pre_hook(lambda _, given, q=quantizer: (q.fake_quantize(given[0]),))


# ------------------------------------------------------------------------------------------------ texts
Logits = Any
"""float64 [tokens, vocabulary]."""


def parted(mine: Logits, theirs: Logits) -> dict[str, Any] | None:
    """Where two choose another token, given the same ones before; None: nowhere."""
    first, second = mine.argmax(1), theirs.argmax(1)
    at = int((first != second).argmax())
    if first[at] == second[at]:
        return None
    apart = np.sqrt(np.mean((mine[: at + 1] - theirs[: at + 1]) ** 2))
    here, there = mine[at], theirs[at]
    return {
        "at": at,
        "lead": round(float(here[first[at]] - here[second[at]]), 4),
        "their_lead": round(float(there[second[at]] - there[first[at]]), 4),
        "apart": round(float(apart), 4),
    }


def texts(pairs: Sequence[tuple[Logits, Logits]]) -> dict[str, Any]:
    """Of each prompt the logits of both, over the text that llama.cpp wrote."""
    found = [parted(mine, theirs) for mine, theirs in pairs]
    apart = [float(np.sqrt(np.mean((mine - theirs) ** 2))) for mine, theirs in pairs]
    return {
        "same_text": found.count(None),
        "logits_apart": round(float(np.mean(apart)), 6),
        "parted": [each for each in found if each is not None],
    }


@torch.no_grad()
def choices(model: Any, prompt: Sequence[int], text: Sequence[int]) -> Logits:
    """The logits that choose each token of ``text`` behind ``prompt``."""
    logits = model(torch.tensor([[*prompt, *text[:-1]]])).logits[0]
    return logits[len(prompt) - 1 :].double().numpy()


# ------------------------------------------------------------------------------------------------ perplexity
def losses(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """-log p of each token but the first, float64."""
    return torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")


def ratio(theirs: torch.Tensor, mine: torch.Tensor) -> dict[str, float]:
    """Of perplexities, and one standard error of it, by token."""
    apart = theirs - mine
    found = math.exp(float(apart.mean()))
    return {"ppl_ratio": found, "standard_error": found * float(apart.std()) / math.sqrt(len(apart))}


@torch.no_grad()
def lost(model: Any, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """By a model of transformers."""
    return torch.cat([losses(model(torch.tensor([window])).logits[0].float(), window) for window in windows])


def lost_there(theirs: LlamaCpp, windows: Sequence[Sequence[int]], vocabulary: int) -> torch.Tensor:
    """By llama.cpp."""
    found = [next(theirs.logits(iter([window]), vocabulary)) for window in windows]
    return torch.cat([losses(torch.from_numpy(x), window) for x, window in zip(found, windows, strict=True)])


# ------------------------------------------------------------------------------------------------ products
def products(path: Path, runs: Sequence[Product]) -> dict[str, Any]:
    """See the module's docstring."""
    from gguf import GGUFReader

    stored = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    errors: dict[str, list[float]] = {"rounded": [], "not": []}
    for run in runs:
        tensor = stored[run.weight]
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
        if kind in FLOATS:
            continue
        weight = decode(block_type(kind), np.array(tensor.data), shape).dequantize().double()
        inputs, outputs = torch.from_numpy(run.inputs), torch.from_numpy(run.outputs).double()
        quantizer = rounding_of(kind)
        assert quantizer is not None
        for name, x in (("rounded", quantizer.fake_quantize(inputs)), ("not", inputs)):
            errors[name].append(float((x.double() @ weight.T - outputs).norm() / outputs.norm()))
    return {"count": len(errors["not"])} | {
        name: {"median": float(f"{np.median(found):.2g}"), "largest": float(f"{max(found):.2g}")}
        for name, found in errors.items()
    }


# ------------------------------------------------------------------------------------------------ all of it
def compare(path: Path, types: Mapping[str, str], windows: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """See the module's docstring."""
    source = open_source(str(path))
    tokenizer, vocabulary = source.tokenizer(), source.config.vocab_size
    model: Any = source.model(torch.float32)
    model.eval()
    theirs, halves = LlamaCpp(path), LlamaCpp(path, exact=False)
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    alike = sum(ids == theirs.ids(text) for ids, text in zip(prompts, PROMPTS, strict=True))
    written = [theirs.greedy(ids, tokens, vocabulary) for ids in prompts]
    there, lost_by_them = [logits.astype(np.float64) for _, logits in written], lost_there(theirs, windows, vocabulary)

    def beside(model: Any) -> dict[str, Any]:
        mine = [choices(model, ids, text) for ids, (text, _) in zip(prompts, written, strict=True)]
        by_me = lost(model, windows)
        said = texts(list(zip(mine, there, strict=True)))
        return said | {"ppl_nybble": math.exp(float(by_me.mean()))} | ratio(lost_by_them, by_me)

    found: dict[str, Any] = {
        "prompts_tokenized_alike": alike, "tokens": len(lost_by_them),
        "ppl_llama_cpp": math.exp(float(lost_by_them.mean())), "float inputs": beside(model),
    }  # fmt: skip
    if set(types.values()) - set(FLOATS):
        round_inputs(model, types)
        found["rounded inputs"] = beside(model)
        found["products"] = products(path, theirs.products(prompts[0], vocabulary))
    other = [
        next(halves.logits(iter([[*ids, *text[:-1]]]), vocabulary))[len(ids) - 1 :].astype(np.float64)
        for ids, (text, _) in zip(prompts, written, strict=True)
    ]
    said = texts(list(zip(other, there, strict=True)))
    found["llama.cpp with float16 keys and values"] = said | ratio(
        lost_there(halves, windows, vocabulary), lost_by_them
    )
    theirs.close()
    halves.close()
    return found


def in_float(path: Path) -> dict[str, Weight]:
    """The values of a file, as they are."""
    source = open_source(str(path))
    return {
        name: Weight(shape=stored.shape, read=partial(_value, source, name)) for name, stored in source.stored().items()
    }


def _value(source: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = dict(source.read([name]))[name]
    return found.float()


def batches(ids: Sequence[int], count: int, size: int = 256) -> Iterator[Sequence[int]]:
    """Windows, one behind the other."""
    for i in range(count):
        yield ids[i * size : (i + 1) * size]


def measure(name: str, kinds: Sequence[str], count: int, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A model as each type."""
    source = open_source(name)
    weights, tokenizer = weights_of(source, codes=False), source.tokenizer()
    text = "\n".join(topics[topic] for topic in split_topics(topics)["evaluation"])
    windows = list(batches(tokenizer(text[: 4000 * count])["input_ids"], count))
    with tempfile.TemporaryDirectory() as folder:
        path, wide = Path(folder) / "model.gguf", Path(folder) / "wide.gguf"
        for kind in kinds:
            begun = time.perf_counter()
            written = write_gguf(path, source.config, weights, tokenizer=tokenizer, file_type=kind)
            seconds = time.perf_counter() - begun
            found: dict[str, Any] = {"bytes": written.nbytes, "seconds": round(seconds, 1)}
            found |= compare(path, written.types, windows, tokens)
            if set(written.types.values()) - set(FLOATS):
                as_f32 = write_gguf(wide, source.config, in_float(path), tokenizer=tokenizer)
                found["values as f32"] = compare(wide, as_f32.types, windows, tokens)["float inputs"]
            yield kind, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["demo:smollm2", "build/ladder/models/llama-30m"])
    parser.add_argument("--types", default="f32,f16,bf16,q8_0,q6_k,q5_k_m,q4_k_m,q4_0,iq4_nl,mxfp4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    found: dict[str, Any] = read_json(options.out) if options.out.exists() else {"models": {}}
    found["xllamacpp"] = version("xllamacpp")
    for model in options.models:
        results = found["models"].setdefault(Path(model).name, {})
        for kind, result in measure(model, options.types.split(","), options.windows, options.tokens):
            results[kind] = result
            print(model, kind, result, flush=True)
            atomic_write_json(options.out, found)


if __name__ == "__main__":
    main()
