"""A tokenizer as GGUF metadata: byte-level BPE (``gpt2``) and sentencepiece's BPE with byte tokens (``llama``).

llama.cpp cuts text by rules that have names; a tokenizer can be written if its own rules are those of one of
:data:`nybble.models.sources.gguf_tokenizer.PRE_TOKENIZERS`. Sentencepiece's merges become scores: a token's is minus
the number of the merge that makes it, so the pair that merges first has the highest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nybble.core.errors import ModelError
from nybble.core.guard import reading
from nybble.models.sources.gguf_tokenizer import CONTROL, GPT2, PRE_TOKENIZERS, USER_DEFINED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
NAMED = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
INSTEAD = "Leave the tokenizer out, or use another target."


def tokenizer_pairs(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """Key -> value of ``tokenizer.ggml.*``, and the chat template.

    Args:
        tokenizer: a fast one of transformers.
        rows: of the embedding; ids that no token has become unused ones.

    Raises:
        ModelError: a tokenizer that llama.cpp has no rules for; names what is different.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json, which GGUF is written from. {INSTEAD}")
    with reading("the tokenizer", ModelError):
        said = json.loads(backend.to_str())
    if said["model"].get("type") != "BPE":
        raise ModelError(
            f"a tokenizer of type {said['model'].get('type')} can't be written as GGUF: BPE can. {INSTEAD}"
        )
    made = _sentencepiece(said) if said["model"].get("byte_fallback") else _byte_level(said)
    pairs = {"tokenizer.ggml.model": made.pop("model")} | _tokens(said, rows, made.pop("scores", None)) | made
    for key, name in NAMED.items():
        number = getattr(tokenizer, name, None)
        if isinstance(number, int):
            pairs[f"tokenizer.ggml.{key}_token_id"] = number
    ids = list(tokenizer("a")["input_ids"])
    pairs["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    pairs["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    return pairs | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _tokens(said: Mapping[str, Any], rows: int, scores: Mapping[str, float] | None) -> dict[str, Any]:
    """The vocabulary in the order of ids, with the kind of each token."""
    vocabulary = {number: token for token, number in said["model"]["vocab"].items()}
    kinds = {number: BYTE if scores is not None and _is_byte(token) else NORMAL for number, token in vocabulary.items()}
    if (unknown := said["model"].get("unk_token")) in said["model"]["vocab"]:
        kinds[said["model"]["vocab"][unknown]] = UNKNOWN
    for token in said["added_tokens"]:
        vocabulary[token["id"]] = token["content"]
        if kinds.get(token["id"]) != UNKNOWN:
            kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if vocabulary and max(vocabulary) >= rows:
        raise ModelError(f"the tokenizer has the token {max(vocabulary)}, and the model's embedding {rows} rows.")
    listed = [vocabulary.get(number, f"[PAD{number}]") for number in range(rows)]
    pairs: dict[str, Any] = {
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": [kinds.get(number, UNUSED) for number in range(rows)],
    }
    if scores is not None:
        pairs["tokenizer.ggml.scores"] = [float(scores.get(token, 0.0)) for token in listed]
    return pairs


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Both spellings of tokenizer.json: pairs, and text with a space between."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in said["model"]["merges"]]
    return [(pair[0], pair[1]) for pair in pairs]


# ------------------------------------------------------------------------------------------------ byte-level BPE
def _byte_level(said: Mapping[str, Any]) -> dict[str, Any]:
    kind = (said.get("normalizer") or {}).get("type", "")
    if kind not in ("", "NFC"):  # llama.cpp does nothing for NFC, as its own converter leaves it out
        raise ModelError(f"a byte-level tokenizer that normalizes by {kind} can't be written as GGUF. {INSTEAD}")
    rules, merges = _rules(said), _merges(said)
    if not merges:
        raise ModelError(f"a tokenizer without merges can't be written as GGUF: llama.cpp has no such BPE. {INSTEAD}")
    if spaced := next((pair for pair in merges if " " in pair[0] + pair[1]), None):
        raise ModelError(f"GGUF writes a merge with a space between, so {spaced} can't be one. {INSTEAD}")
    return {
        "model": "gpt2",
        "tokenizer.ggml.pre": rules,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
    }


def _rules(said: Mapping[str, Any]) -> str:
    """The name under which llama.cpp cuts text as this tokenizer does."""
    cuts = tuple(_cuts(said.get("pre_tokenizer") or {}))
    whole = bool(said["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if known.patterns == cuts and known.whole_words == whole:
            return name
    for name, known in PRE_TOKENIZERS.items():
        if known.patterns == cuts:
            raise ModelError(
                f"this tokenizer cuts text as llama.cpp's {name!r}, but "
                f"{'takes' if whole else 'does not take'} whole words without merges. {INSTEAD}"
            )
    raise ModelError(f"llama.cpp has no name for how this tokenizer cuts text ({cuts!r:.300}). {INSTEAD}")


def _cuts(pre: Mapping[str, Any]) -> list[str]:
    """Regular expressions, each cutting the pieces of the one before."""
    kind = pre.get("type")
    if kind == "Sequence":
        return [cut for part in pre["pretokenizers"] for cut in _cuts(part)]
    if kind == "Digits" and pre.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return [GPT2] if pre.get("use_regex", True) else []
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        pattern = pre["pattern"].get("Regex")
        if isinstance(pattern, str):
            return [pattern]
    raise ModelError(f"llama.cpp has no rules for a pre-tokenizer of type {kind}: {dict(pre)!r:.200}. {INSTEAD}")


# ------------------------------------------------------------------------------------------------ sentencepiece
def _sentencepiece(said: Mapping[str, Any]) -> dict[str, Any]:
    prefix = _space_prefix(said)
    scores: dict[str, float] = {}
    for number, (left, right) in enumerate(_merges(said)):
        scores.setdefault(left + right, -float(number))
    low = -float(len(said["model"]["merges"]) + 1)
    for token in said["model"]["vocab"]:  # characters: no merge makes them, and none is asked for
        scores.setdefault(token, 0.0 if _is_byte(token) else low)
    return {
        "model": "llama",
        "scores": scores,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _space_prefix(said: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word; refuses what else may happen to it."""
    prefix = False
    steps = [*_steps(said.get("normalizer"), "normalizers"), *_steps(said.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif kind == "Metaspace":
            prefix |= step.get("prepend_scheme", "always") != "never"
        elif kind == "Replace" and step.get("content") == "▁" and step.get("pattern") == {"String": " "}:
            continue
        elif kind == "Split" and step.get("pattern") == {"String": " "}:
            continue  # Gemma's; spaces are gone by then
        else:
            raise ModelError(f"llama.cpp has no rules for a step {dict(step)!r:.200} of this tokenizer. {INSTEAD}")
    return prefix


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return [step for each in part[inner] for step in _steps(each, inner)] if part.get("type") == "Sequence" else [part]
