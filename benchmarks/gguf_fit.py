"""Weights rounded to GGUF's types by nybble and by ggml's own quantizer: error and perplexity, in one run.

    pip install --target PEER libggml-python
    PYTHONPATH=PEER python benchmarks/gguf_fit.py --out benchmarks/results/gguf_fit.json      # adds to what is there

Both round every matrix to the type that the file type's plan gives it. ``plain``: all columns count alike;
``weighted``: each by its inputs' energy over 16 windows of calibration text (llama.cpp's imatrix), the head's, which is
the embedding too, by the inputs of the head. Errors are squared, weighted or not, summed over the model and relative to
the sum of the weights' squares. Perplexity is nybble's, in float32, of the rounded values; its ratio is ggml's over
nybble's with one standard error by token, so above 1 is nybble's lead.

The ladder's llama of 3M weights has rows of 256 and 768, so that all are K-quants; of 30M, 512 and 1408 (``ffn_down``
falls back to Q5_0 and Q8_0); SmolLM2's 576 has none but in ``ffn_down`` (1536).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from benchmarks.gguf_runs import batches, lost, ratio
from tests.parts.models.ggml import quantize_chunk
from torch import Tensor, nn

from nybble.core.files import atomic_write_json
from nybble.data.sources.builtin import split_topics
from nybble.models.build.config_file import read_json
from nybble.models.gguf.mixes import FLOATS
from nybble.models.gguf.of_source import weights_of
from nybble.models.gguf.types import block_type, decode
from nybble.models.gguf.write import plan
from nybble.models.sources.open import open_source

LADDER = Path("build/ladder")


def text_of(part: str, ladder: bool) -> str:
    """Calibration or evaluation text: of the ladder's own, or of Python's help topics."""
    if not ladder:
        parts: Any = split_topics(topics)
        return "\n".join(topics[name] for name in parts[part])
    file = LADDER / "texts" / {"calibration": "calibration.jsonl.xz", "evaluation": "perl-doc.jsonl.xz"}[part]
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(200), strict=False))


@torch.no_grad()
def energies_of(model: Any, windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Parameter -> mean square of each input; of a head that is tied, the embedding's."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = found.get(name, 0) + given[0].double().square().flatten(0, -2).mean(0) / len(windows)

        return module.register_forward_pre_hook(hook)

    tied = model.config.tie_word_embeddings
    handles = [
        watch("model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for window in windows:
        model(torch.tensor([window]))
    for handle in handles:
        handle.remove()
    return {name: energy.float() for name, energy in found.items()}


def by_nybble(kind: str, weight: Tensor, energy: Tensor | None) -> Tensor:
    """Rounded values."""
    quantizer = block_type(kind).quantizer
    return quantizer.fake_quantize(weight, quantizer.fit(weight, None if energy is None else energy[None]))


def by_ggml(kind: str, weight: Tensor, energy: Tensor | None) -> Tensor:
    """Rounded values."""
    found = block_type(kind)
    data = quantize_chunk(found.number, weight.numpy(), None if energy is None else energy.numpy())
    return decode(found, data, tuple(weight.shape)).dequantize()


WAYS = {"nybble": by_nybble, "ggml": by_ggml}


def errors(weight: Tensor, rounded: Tensor, energy: Tensor | None) -> tuple[float, float]:
    """Summed squares: of what was lost, and of the weight."""
    by = torch.ones(weight.shape[1]) if energy is None else energy
    return float(((rounded - weight).double().square() * by).sum()), float((weight.double().square() * by).sum())


@torch.no_grad()
def measure(name: str, kinds: Sequence[str], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A model as each file type."""
    source, ladder = open_source(name), "ladder" in name
    tokenizer = source.tokenizer()
    calibration, windows = (
        list(batches(tokenizer(text_of(part, ladder)[: 2000 * n])["input_ids"], n))
        for part, n in (("calibration", 16), ("evaluation", count))
    )
    model: Any = source.model(torch.float32)
    model.eval()
    energies = energies_of(model, calibration)
    params: Mapping[str, Tensor] = dict(model.named_parameters())
    original = {key: value.clone() for key, value in params.items()}
    for file_type in kinds:
        tensors = [
            t for t in plan(source.config, weights_of(source, codes=False), file_type)[0] if t.kind not in FLOATS
        ]
        result: dict[str, Any] = {"types": {t.kind: sum(u.kind == t.kind for u in tensors) for t in tensors}}
        for weighted in (False, True):
            losses: dict[str, Tensor] = {}
            rows: dict[str, Any] = {}
            for way, round_to in WAYS.items():
                lost_by, whole, begun = [0.0, 0.0], [0.0, 0.0], time.process_time()
                rounded = {
                    t.source: round_to(t.kind, original[t.source], energies[t.source] if weighted else None)
                    for t in tensors
                }
                seconds = time.process_time() - begun
                for key, value in rounded.items():
                    for i, energy in enumerate((None, energies[key])):
                        a, b = errors(original[key], value, energy)
                        lost_by[i], whole[i] = lost_by[i] + a, whole[i] + b
                    params[key].copy_(value)
                losses[way] = lost(model, windows)
                rows[way] = {
                    "error": lost_by[0] / whole[0], "weighted_error": lost_by[1] / whole[1],
                    "ppl": math.exp(float(losses[way].mean())), "cpu_seconds": round(seconds, 2),
                }  # fmt: skip
                for key in rounded:
                    params[key].copy_(original[key])
            result["weighted" if weighted else "plain"] = rows | {
                "error_ratio": rows["ggml"]["error"] / rows["nybble"]["error"],
                "weighted_error_ratio": rows["ggml"]["weighted_error"] / rows["nybble"]["weighted_error"],
                **ratio(losses["ggml"], losses["nybble"]),
            }
        result["ppl_float"] = math.exp(float(lost(model, windows).mean()))
        result["tokens"] = len(losses["ggml"])
        yield file_type, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    models = [str(LADDER / "models" / "llama-3m"), str(LADDER / "models" / "llama-30m"), "demo:smollm2"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--types", default="q4_k_m,q4_0,q3_k_m,q6_k")
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    found: dict[str, Any] = read_json(options.out) if options.out.exists() else {"models": {}}
    found["libggml-python"] = version("libggml-python")
    for model in options.models:
        results = found["models"].setdefault(Path(model).name, {})
        for kind, result in measure(model, options.types.split(","), options.windows):
            results[kind] = result
            print(model, kind, json.dumps(result), flush=True)
            atomic_write_json(options.out, found)


if __name__ == "__main__":
    main()
