"""llama.cpp runs GGUF files that nybble wrote: greedy text and perplexity beside nybble's own, and its own quantizer's.

    pip install --target PEER xllamacpp libggml-python
    PYTHONPATH=PEER python benchmarks/gguf_runs.py --out benchmarks/results/gguf_runs.json

SmolLM2-135M-Instruct is written as each type. llama.cpp, the library that the package xllamacpp carries, is called
through its C interface with one thread; nybble's side is the same file opened by nybble, in float32. llama.cpp rounds
activations to eight bits before its products with quantized weights, so logits differ a little; under ``inputs
rounded`` nybble's side does so too.
``q4_k_m by ggml`` is the same plan with the weights rounded by ggml's quantizer (libggml-python) instead of by nybble.
"""

from __future__ import annotations

import argparse
import ctypes
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
from tests.parts.models.ggml import quantize_chunk

from nybble.core.files import atomic_write_json
from nybble.data.sources.builtin import split_topics
from nybble.models.gguf.metadata import arch_for, gguf_name
from nybble.models.gguf.mixes import FLOATS
from nybble.models.gguf.of_source import weights_of
from nybble.models.gguf.types import block_type, decode
from nybble.models.gguf.write import Weight, plan, write_gguf
from nybble.models.sources.open import open_source
from nybble.pipelines.load import load
from nybble.quantizer import Quantizer

PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n",
    "Once upon a time, there was", "The three states of matter are", "In Python, a list is",
    "The largest planet of the solar system", "To make tea, first",
)  # fmt: skip


class _Params(ctypes.Structure):
    """At least as large as llama_model_params and llama_context_params, whose fields aren't touched."""

    _fields_ = (("room", ctypes.c_char * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embedding", "position", "sequences", "sequence", "logits")),
    )


class LlamaCpp:
    """A GGUF in llama.cpp."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        self._library = library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
        library.llama_model_default_params.restype = library.llama_context_default_params.restype = _Params
        library.llama_model_load_from_file.restype = library.llama_init_from_model.restype = ctypes.c_void_p
        library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _Params)
        library.llama_init_from_model.argtypes = (ctypes.c_void_p, _Params)
        library.llama_batch_get_one.restype = _Batch
        library.llama_batch_get_one.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        library.llama_decode.argtypes = (ctypes.c_void_p, _Batch)
        library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
        for name in ("llama_get_logits", "llama_free", "llama_model_free", "llama_model_get_vocab"):
            getattr(library, name).argtypes = (ctypes.c_void_p,)
        library.llama_model_get_vocab.restype = ctypes.c_void_p
        library.llama_set_n_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
        library.llama_tokenize.argtypes = (
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        )  # fmt: skip
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp can't load {path.name}")

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, special ones as the file asks."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        vocab = self._library.llama_model_get_vocab(self._model)
        return list(room[: self._library.llama_tokenize(vocab, data, len(data), room, len(room), True, False)])

    def logits(self, parts: Iterator[Sequence[int]], vocabulary: int) -> Iterator[np.ndarray[Any, Any]]:
        """Of each token of each part, float32 [tokens, vocabulary]; a part follows the one before."""
        library = self._library
        context = library.llama_init_from_model(self._model, library.llama_context_default_params())
        library.llama_set_n_threads(context, 1, 1)
        try:
            for part in parts:
                tokens, wanted = np.array(part, np.int32), np.ones(len(part), np.int8)
                batch = library.llama_batch_get_one(tokens.ctypes.data, len(part))
                batch.logits = wanted.ctypes.data
                if library.llama_decode(context, batch):
                    raise SystemExit("llama.cpp can't decode")
                yield np.ctypeslib.as_array(library.llama_get_logits(context), (len(part), vocabulary)).copy()
        finally:
            library.llama_free(context)

    def greedy(self, ids: Sequence[int], count: int, vocabulary: int) -> list[int]:
        """The ``count`` tokens that follow."""
        found: list[int] = []

        def parts() -> Iterator[Sequence[int]]:
            yield ids
            while len(found) < count:
                yield found[-1:]

        for logits in self.logits(parts(), vocabulary):
            found.append(int(logits[-1].argmax()))
        return found[:count]

    def close(self) -> None:
        """Free the model."""
        self._library.llama_model_free(self._model)


def nll(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Sum of -log p of each token but the first."""
    wanted = torch.tensor(ids[1:])
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), wanted, reduction="sum"))


INPUTS = {
    32: "int8 group=32 scale_format=float16 raw_scale=true reciprocal=true rounding=half-away",  # Q8_0, Q8_1
    256: "int8 group=256 scale_format=float32",  # Q8_K
}
"""What llama.cpp's CPU products round their inputs to, by the block of the weight's type."""


def round_inputs(model: Any, types: Mapping[str, str]) -> None:
    """Let the products of a float model round their inputs as llama.cpp does under weights of these types."""
    arch = arch_for(model.config)[1]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            at = "token_embd.weight" if name == "lm_head" else gguf_name(f"{name}.weight", arch)
            kind = types.get(str(at), types.get("output.weight", "F32"))
            if kind not in FLOATS:
                quantizer = Quantizer(INPUTS[min(256, max(32, block_type(kind).block))])
                module.register_forward_pre_hook(lambda _, given, q=quantizer: (q.fake_quantize(given[0]),))


@torch.no_grad()
def compare(
    path: Path, windows: Sequence[Sequence[int]], tokens: int, types: Mapping[str, str], rounded: bool
) -> dict[str, Any]:
    """Greedy text and perplexity of a file, here and there; ``rounded``: with inputs rounded here too."""
    loaded: Any = load(str(path), dtype=torch.float32)
    (model, tokenizer), theirs = loaded, LlamaCpp(path)
    if rounded:
        round_inputs(model, types)
    vocabulary, same, first, agree = model.config.vocab_size, 0, [], 0
    for prompt in PROMPTS:
        ids = list(tokenizer(prompt)["input_ids"])
        agree += ids == theirs.ids(prompt)
        their = theirs.greedy(ids, tokens, vocabulary)
        mine = model.generate(
            torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        same += mine == their
        first.append(next((i for i, (a, b) in enumerate(zip(mine, their, strict=True)) if a != b), tokens))
    total, lost = [0.0, 0.0], 0
    for window in windows:
        (other,) = theirs.logits(iter([window]), vocabulary)
        total[0] += nll(model(torch.tensor([window])).logits[0].float(), window)
        total[1] += nll(torch.from_numpy(other), window)
        lost += len(window) - 1
    theirs.close()
    ppl = [math.exp(value / lost) for value in total]
    return {
        "prompts_tokenized_alike": agree, "same_text": same, "first_other_token": first,
        "ppl_nybble": ppl[0], "ppl_llama_cpp": ppl[1], "ppl_ratio": ppl[1] / ppl[0], "tokens": lost,
    }  # fmt: skip


def by_ggml(config: Any, weights: dict[str, Weight], file_type: str) -> dict[str, Weight]:
    """The same weights, rounded by ggml to the types of the same plan."""
    made = dict(weights)
    for tensor in plan(config, weights, file_type)[0]:
        if tensor.kind in FLOATS:
            continue
        kind, weight = block_type(tensor.kind), weights[tensor.source]
        values: Any = weight.read()
        stored = decode(kind, quantize_chunk(kind.number, values.float().numpy()), weight.shape)
        made[tensor.source] = Weight(shape=weight.shape, read=partial(lambda v: v, stored), stored=stored)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="f16,q8_0,q6_k,q5_k_m,q4_k_m,q4_k_m by ggml,q4_0,iq4_nl,mxfp4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    source = open_source("demo:smollm2")
    weights, tokenizer = weights_of(source, codes=False), source.tokenizer()
    text = "\n".join(topics[name] for name in split_topics(topics)["evaluation"])
    ids = tokenizer(text[: 4000 * options.windows])["input_ids"]
    windows = [ids[i * 256 : (i + 1) * 256] for i in range(options.windows)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.types.split(","):
            path, kind = Path(folder) / "model.gguf", name.partition(" ")[0]
            begun = time.perf_counter()
            given = by_ggml(source.config, weights, kind) if "ggml" in name else weights
            written = write_gguf(path, source.config, given, tokenizer=tokenizer, file_type=kind, name="SmolLM2")
            seconds = time.perf_counter() - begun
            results[name] = {"bytes": written.nbytes, "seconds": round(seconds, 1)}
            results[name] |= compare(path, windows, options.tokens, written.types, False)
            if set(written.types.values()) - set(FLOATS):
                results[name]["inputs rounded"] = compare(path, windows, options.tokens, written.types, True)
            print(name, results[name], flush=True)
            atomic_write_json(
                options.out, {"xllamacpp": version("xllamacpp"), "model": "demo:smollm2", "results": results}
            )


if __name__ == "__main__":
    main()
