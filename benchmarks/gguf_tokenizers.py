"""Token ids of tokenizers rebuilt from GGUF files beside llama.cpp's own, on 10,000 lines for every pre-tokenizer.

    pip install --target PEER xllamacpp
    PYTHONPATH=PEER python benchmarks/gguf_tokenizers.py --out benchmarks/results/gguf_tokenizers.json

A byte-level BPE is trained on the first lines and written, with a random model of one block, to one GGUF for each
name of a pre-tokenizer; some whole words stand in the vocabulary without a merge that makes them. llama.cpp, the
library that the package xllamacpp carries, is called through its C interface. ``--fixture`` writes a small vocabulary
and llama.cpp's ids of a few lines for the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nybble.core.files import atomic_write_json, atomic_write_text
from nybble.models.sources.gguf_header import read_gguf_header
from nybble.models.sources.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer

LINES = 10_000
PIECES = (
    "don't", "DON'T", "we'Re", "I'M", "l'été", "it’s", "1", "12", "123", "12345678", "3.14159", "1,000,000",
    "२०२४", "½", "Ⅻ", "²", "naïve", "nai\u0308ve", "Ångström", "Straße", "ЁЖИК ёжик", "Ελληνικά",
    "עִבְרִית", "العربية ١٢٣", "हिन्दी में", "ไทย", "中文字符", "日本語テキスト", "한국어", "\u1112\u1161\u11ab", "🙂",
    "👩‍👩‍👧", "🇩🇪", "\u200b", "\u00a0", "\u3000", "\u2028", "\u0085", "\ufeff", "\u00ad", "\t", "\t\t", "  ",
    "    ", "\n", "\n\n", " \n", "\n ", "\r\n", "\r", "\r\n\r\n", "\v", "\f", "\x00", "\x1f", "\x7f", "...",
    "!!!", "?!", "$100", "a_b", "__init__", "#!/bin", "x=y+1;", "{}[]()", "<|x|>", "http://a.b/c?d=e&f",
    "€", "™", "→", "≠", "^~`|", "'s", "'T", "' s", "CamelCaseXMLHttp", "a\u0301", "\U0001d4d0", "𐍈",
    "\ufffd", "ǅ", "ﬁ", "٪", "—", "…", "„“", "０１２", "Ａｂｃ",
)  # fmt: skip
"""What cuts text: contractions, numbers, scripts, marks, white space, symbols."""


def lines(count: int = LINES) -> list[str]:
    """Half prose of Python's language reference, half random mixtures of :data:`PIECES` and words of it; fixed."""
    prose = [line for name in sorted(topics) for line in topics[name].splitlines() if line.strip()]
    words, draw = " ".join(prose).split(), random.Random(0)
    found = [prose[draw.randrange(len(prose))] for _ in range(count // 2)]
    for _ in range(count - len(found)):
        parts = [draw.choice(PIECES) if draw.random() < 0.6 else draw.choice(words) for _ in range(draw.randint(1, 9))]
        found.append("".join(part + draw.choice(("", " ", " ", "  ")) for part in parts))
    return found


def vocabulary(text: Iterable[str], size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a trained byte-level BPE, and behind them whole words that no merges make."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),  # type: ignore[arg-type]
    )
    state = json.loads(trained.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]
    return [*tokens, *(word for word in ("Ġvariables", "Ġstatement", "ĠXMLHttp") if word not in tokens)], merges


def write_gguf(path: Path, pre: str, tokens: Sequence[str], merges: Sequence[str]) -> None:
    """A random llama of one block over this vocabulary, with two control tokens behind it."""
    writer, width, rows = gguf.GGUFWriter(path, "llama"), 32, [*tokens, "<s>", "</s>"]
    writer.add_context_length(64), writer.add_embedding_length(width), writer.add_block_count(1)
    writer.add_feed_forward_length(width), writer.add_head_count(2), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(width // 2)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre(pre)
    writer.add_token_list(rows), writer.add_token_types([1] * len(tokens) + [3, 3]), writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens)), writer.add_eos_token_id(len(tokens) + 1)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(rows), width), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


class _Params(ctypes.Structure):
    """At least as large as llama_model_params, whose fields aren't touched."""

    _fields_ = (("room", ctypes.c_char * 1024),)


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF, through the library that xllamacpp carries."""

    def __init__(self) -> None:
        import xllamacpp

        folder = Path(xllamacpp.__file__).parent
        self._library = library = ctypes.CDLL(str(next(folder.glob("*.so"))))
        library.llama_model_default_params.restype = _Params
        library.llama_model_load_from_file.restype = library.llama_model_get_vocab.restype = ctypes.c_void_p
        library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _Params)
        library.llama_model_get_vocab.argtypes = library.llama_model_free.argtypes = (ctypes.c_void_p,)
        library.llama_tokenize.argtypes = (
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        )  # fmt: skip
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()

    def tokenizer(self, path: Path) -> Callable[[str], list[int]]:
        """Text -> ids, with the special tokens that the file, or llama.cpp's defaults, ask for."""
        library = self._library
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp can't load {path.name}")
        vocab = library.llama_model_get_vocab(model)

        def ids(text: str) -> list[int]:
            data = text.encode()
            room = (ctypes.c_int32 * (len(data) + 8))()
            count = library.llama_tokenize(vocab, data, len(data), room, len(room), True, False)
            return list(room[:count])

        return ids


def compare(pre: str, tokens: list[str], merges: list[str], text: Sequence[str], theirs: LlamaCpp) -> dict[str, Any]:
    """How many lines have other ids, and the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_gguf(path, pre, tokens, merges)
        wanted = [*map(theirs.tokenizer(path), text)]
        ours = build_tokenizer(read_gguf_header(path).metadata, path)
        found = ours(list(text))["input_ids"]
    differ = [number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    first = {"text": text[differ[0]], "nybble": found[differ[0]], "llama.cpp": wanted[differ[0]]} if differ else None
    return {"lines": len(text), "tokens": sum(map(len, wanted)), "differ": len(differ), "first": first}


def fixture(tokens: list[str], merges: list[str], theirs: LlamaCpp) -> dict[str, Any]:
    """A small vocabulary, a few lines, and llama.cpp's ids of these for each pre-tokenizer."""
    text = ["".join(f"{a} {b}" for a, b in zip(PIECES[i::9], PIECES[i + 1 :: 9], strict=False)) for i in range(9)]
    text += ["The variables of  a statement:\n    don't WE'LL   12345\t67\r\n", ""]
    ids, seen = {}, list[object]()
    for pre, rules in PRE_TOKENIZERS.items():
        if rules in seen:
            continue  # another name of the same rules
        seen.append(rules)
        with tempfile.TemporaryDirectory() as folder:
            write_gguf(Path(folder) / "tiny.gguf", pre, tokens, merges)
            ids[pre] = [*map(theirs.tokenizer(Path(folder) / "tiny.gguf"), text)]
    return {"xllamacpp": version("xllamacpp"), "tokens": tokens, "merges": merges, "lines": text, "ids": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fixture", type=Path)
    options = parser.parse_args()
    text, theirs = lines(), LlamaCpp()
    tokens, merges = vocabulary(text, 3000)
    results = {}
    for pre in PRE_TOKENIZERS:
        results[pre] = compare(pre, tokens, merges, text, theirs)
        print(pre, {key: value for key, value in results[pre].items() if key != "first"}, results[pre]["first"] or "")
    atomic_write_json(options.out, {"xllamacpp": version("xllamacpp"), "pre_tokenizers": results})
    if options.fixture:
        made = fixture(*vocabulary(text, 400), theirs)
        rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in made.items()]
        atomic_write_text(options.fixture, "{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
