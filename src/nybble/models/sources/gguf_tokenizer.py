"""The tokenizer in a GGUF's metadata.

Byte-level BPE (``tokenizer.ggml.model = gpt2``) is rebuilt here in a second; sentencepiece vocabularies, whose merges
must be recovered from scores, go through transformers' own converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.core.errors import ModelError, did_you_mean
from nybble.core.guard import reading

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

# ``tokenizer.ggml.pre`` -> the regular expression that cuts text before BPE; "" is ByteLevel's own (GPT-2's),
# "digits" is that after cutting out single digits. The expressions are those of the models' tokenizer.json.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "smollm": "digits",
    "gpt-2": "",
    "default": "",
    "qwen2": QWEN2,
    "llama-bpe": QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?", 1),
}
CONTROL, USER_DEFINED = 3, 4


def _list(metadata: Mapping[str, Any], key: str, kind: type, place: Path) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        raise ModelError(f"{place} has no usable tokenizer: tokenizer.ggml.{key} is not a list of {kind.__name__}.")
    return value


def _byte_level_bpe(metadata: Mapping[str, Any], place: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"{place}: pre-tokenizer {pre!r} is unknown.{did_you_mean(str(pre), PRE_TOKENIZERS)}")
    tokens = _list(metadata, "tokens", str, place)
    merges = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges", str, place)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    pattern = PRE_TOKENIZERS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in ("", "digits"))
    if pattern == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level] if pattern else [byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added(metadata: Mapping[str, Any], place: Path) -> list[AddedToken]:
    """Control tokens (special) and user-defined ones, in the order of their ids."""
    from tokenizers import AddedToken

    tokens = _list(metadata, "tokens", str, place)
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
        if metadata.get("tokenizer.ggml.add_bos_token"):
            _prepend_bos(backend, metadata, path)
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


def _prepend_bos(backend: Tokenizer, metadata: Mapping[str, Any], path: Path) -> None:
    """Start every sequence with the beginning-of-sequence token."""
    from tokenizers import processors

    tokens = _list(metadata, "tokens", str, path)
    index = metadata["tokenizer.ggml.bos_token_id"]
    bos = tokens[index]
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, index)]
    )
