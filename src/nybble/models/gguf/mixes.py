"""Which tensor gets which type: a block type alone, or llama.cpp's mixtures (``Q4_K_M``) as data.

The mixtures give more bits to what they hurt most: values (``attn_v``), the second half of the MLP (``ffn_down``), the
head. Rules as in llama.cpp, ``src/llama-quant.cpp`` (``llama_tensor_get_type``), for models of the llama family. Where
rows are no whole blocks the type falls back as there, and the writer says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nybble.core.errors import UsageError, did_you_mean
from nybble.models.gguf.types import block_type, writable_types

Choice = Callable[[int, int], str]
"""``(block, blocks) -> type``; an empty string leaves the mixture's own."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A mixture.

    Attributes:
        base: the type of what no rule names. number: ggml's file type. rules: tensor within a block -> type.
        head: of the output, and of the embedding where that is the output too. embedding: else; empty: base.
    """

    base: str
    number: int
    rules: Mapping[str, Choice] = field(default_factory=dict)
    head: str = "Q6_K"
    embedding: str = ""


def more(kind: str) -> Choice:
    """``kind`` for the first and last eighth of the blocks and every third between (``use_more_bits``)."""
    return lambda i, n: kind if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else ""


def first(share: int, kind: str, rest: str = "") -> Choice:
    """``kind`` for the first ``1 / share`` of the blocks."""
    return lambda i, n: kind if i < n // share else rest


def few(count: int, kind: str, rest: str = "") -> Choice:
    """``kind`` for the first ``count`` blocks."""
    return lambda i, n: kind if i < count else rest


def every(kind: str) -> Choice:
    """``kind`` for all."""
    return lambda i, n: kind


MIXES = {
    "Q2_K": Mix(
        base="Q2_K", number=10,
        rules={"attn_v": every("Q3_K"), "attn_output": every("Q3_K"), "ffn_down": every("Q3_K")},
    ),
    "Q3_K_S": Mix(base="Q3_K", number=11),
    "Q3_K_M": Mix(
        base="Q3_K", number=12,
        rules={"attn_v": few(2, "Q5_K", "Q4_K"), "attn_output": every("Q4_K"), "ffn_down": first(16, "Q5_K", "Q4_K")},
    ),
    "Q3_K_L": Mix(
        base="Q3_K", number=13,
        rules={"attn_v": every("Q5_K"), "attn_output": every("Q5_K"), "ffn_down": every("Q5_K")},
    ),
    "Q4_K_S": Mix(base="Q4_K", number=14, rules={"attn_v": few(4, "Q5_K"), "ffn_down": first(8, "Q5_K")}),
    "Q4_K_M": Mix(base="Q4_K", number=15, rules={"attn_v": more("Q6_K"), "ffn_down": more("Q6_K")}),
    "Q5_K_S": Mix(base="Q5_K", number=16),
    "Q5_K_M": Mix(base="Q5_K", number=17, rules={"attn_v": more("Q6_K"), "ffn_down": more("Q6_K")}),
}  # fmt: skip
NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
    "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41,
    "Q3_K": 11, "Q4_K": 14, "Q5_K": 16,
}  # fmt: skip
"""ggml's number of a file of one type (``LlamaFileType``)."""
HEADS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0"}
"""Types of a file whose head has another than Q6_K."""
SHORTER = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q1_0": "Q4_0", "Q2_0": "Q4_0", "NVFP4": "MXFP4",
}  # fmt: skip
"""For rows that a type's blocks don't divide (``llama_tensor_get_type_fallback``; the last three are not there)."""
FLOATS = {"F32": 0, "F16": 1, "BF16": 30}


def file_types() -> list[str]:
    """Everything that a file can be asked to be."""
    kinds = [name.replace("-", "_").upper() for name in writable_types()]
    return sorted({*MIXES, *kinds, *FLOATS})


def mix(name: str) -> Mix:
    """The mixture called ``name``, in any case.

    Raises:
        UsageError: there is none.
    """
    upper = name.upper().replace("-", "_")
    if upper not in file_types():
        raise UsageError(f"unknown GGUF type {name!r}.{did_you_mean(upper, file_types())}")
    if upper in MIXES:
        return MIXES[upper]
    head = HEADS.get(upper, "Q6_K")
    apart = upper not in FLOATS and block_type(upper).scaled_apart  # llama.cpp looks for no scale of an embedding
    return Mix(base=upper, number=NUMBERS[upper], head=head, embedding=head if apart else "")


def file_type_name(number: object) -> str:
    """What a file of ``general.file_type`` is called; empty where neither nybble nor the package gguf knows it."""
    from gguf.constants import LlamaFileType

    if type(number) is not int:
        return ""
    ours = {n: name for name, n in NUMBERS.items()} | {found.number: name for name, found in MIXES.items()}
    theirs = {kind.value: kind.name.partition("_")[2] for kind in LlamaFileType}  # MOSTLY_Q2_K_S
    return (theirs | ours).get(number, "")


def type_for(asked: Mix, name: str, blocks: int, tied: bool) -> str:
    """The type of a tensor, before rows are looked at.

    Args:
        asked: of the file.
        name: GGUF's, ``blk.3.attn_v.weight``.
        blocks: how many the model has.
        tied: whether the embedding is the output too.
    """
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return asked.head
    if name == "token_embd.weight":
        return asked.embedding or asked.base
    prefix, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if prefix == "blk" and number.isdecimal():
        choice = asked.rules.get(part.removesuffix(".weight"))
        if choice is not None:
            return choice(int(number), blocks) or asked.base
    return asked.base


def fitting(kind: str, columns: int) -> str:
    """``kind``, or what stands for it where its blocks don't divide the columns; F16 where nothing does."""
    while kind not in FLOATS and columns % block_type(kind).block:
        kind = SHORTER.get(kind, "F16")
    return kind
