"""The tokenizer in a GGUF's metadata.

Byte-level BPE (``tokenizer.ggml.model = gpt2``) is rebuilt here in a second; sentencepiece vocabularies, whose merges
must be recovered from scores, go through transformers' own converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.core.errors import ModelError, did_you_mean
from nybble.core.guard import reading

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What llama.cpp does under one name of ``tokenizer.ggml.pre``.

    ``patterns``: regular expressions that cut text before BPE, each the pieces of the one before. ``whole_words``: a
    piece that is a token needs no merges. ``add_bos``: whether a text begins with a token of its own, unless
    ``tokenizer.ggml.add_bos_token`` says something else.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?", 1)
_WORDS = PreTokenizer(patterns=(GPT2,))
_DIGITS = PreTokenizer(patterns=(r"\p{N}", GPT2))
_QWEN2 = PreTokenizer(patterns=(QWEN2,))
_LLAMA3 = PreTokenizer(patterns=(LLAMA3,), whole_words=True, add_bos=True)
_DEFAULT = PreTokenizer(
    patterns=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
)
# Each compared with llama.cpp's own ids by benchmarks/gguf_tokenizers.py.
PRE_TOKENIZERS = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), _WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer(patterns=(LLAMA3,))),
}
BOS_ID = 11
"""What llama.cpp takes for the beginning and the end of a text where the file doesn't say."""
CONTROL, USER_DEFINED = 3, 4


def _list(metadata: Mapping[str, Any], key: str, kind: type, place: Path) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        raise ModelError(f"{place} has no usable tokenizer: tokenizer.ggml.{key} is not a list of {kind.__name__}.")
    return value


def _byte_level_bpe(metadata: Mapping[str, Any], place: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = _pre_tokenizer(metadata, place)
    tokens = _list(metadata, "tokens", str, place)
    merges = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges", str, place)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(metadata: Mapping[str, Any], place: Path) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ModelError(f"{place}: pre-tokenizer {name!r} is unknown.{did_you_mean(str(name), PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _added(metadata: Mapping[str, Any], place: Path) -> list[AddedToken]:
    """Control tokens (special) and user-defined ones, in the order of their ids."""
    from tokenizers import AddedToken

    tokens = _list(metadata, "tokens", str, place)
    if "tokenizer.ggml.token_type" not in metadata:
        return []  # all are ordinary ones, as in llama.cpp
    kinds = _list(metadata, "token_type", int, place)
    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]


def _named_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """bos_token, eos_token ... as text."""
    keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """Rebuild the tokenizer that the GGUF at ``path`` describes.

    Raises:
        ModelError: no tokenizer in the metadata, or one of an unknown kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if metadata.get("tokenizer.ggml.model") != "gpt2":
        with reading(f"the tokenizer of {path}", ModelError):
            other: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False, local_files_only=True
            )
        return other
    with reading(f"the tokenizer of {path}", ModelError):
        backend = _byte_level_bpe(metadata, path)
        added = _added(metadata, path)
        backend.add_special_tokens([t for t in added if t.special])
        backend.add_tokens([t for t in added if not t.special])
        _frame(backend, metadata, path)
        fast: Any = PreTrainedTokenizerFast
        tokenizer: PreTrainedTokenizerBase = fast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            **_named_tokens(metadata, _list(metadata, "tokens", str, path)),
        )
        template = metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            tokenizer.chat_template = template
    return tokenizer


def _frame(backend: Tokenizer, metadata: Mapping[str, Any], path: Path) -> None:
    """Put the tokens for the beginning and the end around every text, where the file or llama.cpp's default asks."""
    from tokenizers import processors

    tokens = _list(metadata, "tokens", str, path)
    asked = {"bos": _pre_tokenizer(metadata, path).add_bos, "eos": False}
    ids = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id", BOS_ID)
        for name, usual in asked.items()
        if metadata.get(f"tokenizer.ggml.add_{name}_token", usual)
    }
    if bad := [name for name, index in ids.items() if not isinstance(index, int) or not 0 <= index < len(tokens)]:
        raise ModelError(
            f"{path}: every text is to have a {bad[0]} token, and {ids[bad[0]]!r} is none of {len(tokens)}."
        )
    if ids:
        named = {name: tokens[index] for name, index in ids.items()}
        before, behind = ([named[name]] if name in named else [] for name in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *before, "$B", *behind],
            special_tokens=[(named[name], index) for name, index in ids.items()],
        )
