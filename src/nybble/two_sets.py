"""Schemes of two sets by name: values for signed places, and for those that are never negative.

Binary and ternary encoders and translators, and vision transformers in 2 to 4 bits.

Softmax's output and what enters the second layer of each MLP have values of their own, {0, a} where others have
{-a, a}: BiT (Liu et al. 2022, arXiv:2205.13016) and TBT (Liu et al. 2023, arXiv:2306.01841). Weights and embeddings
have one width, the second number is that of activations: ``BIT_W1A2`` is 1-1-2 in BiT's words, ``TBT_W2A8`` TBT's
2-2-8. Position and token type embeddings, norms and the last layer of a head stay in float. ``OFQ_W3A3`` is 3-3 of
OFQ (Liu et al. 2023, arXiv:2302.02210), whose first and last layers have 8 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SECOND = r"re:(.*[.])?(layers?[.]\d+[.](ffn[.])?output[.]dense|fc2|lin2|wo|ffn_output)"
"""The second layer of an MLP, as encoders and translators of transformers call it."""
FLOAT = (
    r"re:(.*[.])?(lm_head|score|qa_outputs|classifier([.]out_proj)?|classification_head[.]out_proj|cls[.].*"
    r"|[^.]*position[^.]*|token_type_embeddings|relative_attention_bias)"
)
"""What stays as it is: one pattern, of which each model has some part."""
ENDS = r"re:(.*[.])?(patch_embeddings?[.]projection|([^.]+_)?classifier|head)"
"""The first and the last layer of a vision transformer."""


class TwoSets(NamedTuple):
    """Lines of weights, of embeddings' tables, of activations with a sign and without.

    ``ends``: of a vision transformer, which has no tables, lines of weights and inputs of its first and last layers.
    """

    weights: str
    tables: str
    signed: str
    unsigned: str
    ends: tuple[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scheme, as YAML would hold it."""
        rules = [
            {"targets": [SECOND], "weights": self.weights, "inputs": self.unsigned},
            {"targets": ["Linear"], "weights": self.weights, "inputs": self.signed},
            {"targets": ["Attention"], "matmuls": f"{self.signed} probabilities=({self.unsigned})"},
        ]
        if self.ends is not None:
            first = {"targets": [ENDS], "weights": self.ends[0], "inputs": self.ends[1]}
            return {"rules": [first, *rules], "ignore": []}
        return {"rules": [*rules, {"targets": ["Embedding"], "weights": self.tables}], "ignore": [FLOAT, "lm_head"]}


_ELASTIC = "tensor static scale=elastic"
_BIT = ("binary tensor scale=mean", "binary channel scale=mean")
_TERNARY, _BINARY = ("ternary channel scale=max-entropy",) * 2, ("binary channel scale=mean",) * 2
_EIGHT = ("int8 tensor scale=clamped", "uint8 tensor symmetric=false")


def _ofq(bits: int) -> TwoSets:
    """So many bits, and 8 in the first and last layers."""
    ends = "int8 channel", f"int8_full {_ELASTIC}"
    line = f"midrise{bits} channel scale=max-entropy"
    return TwoSets(line, "", f"int{bits}_full {_ELASTIC}", f"uint{bits} {_ELASTIC}", ends)


TWO_SETS: dict[str, TwoSets] = {
    "BIT_W1A4": TwoSets(*_BIT, f"int4_full {_ELASTIC}", f"uint4 {_ELASTIC}"),
    "BIT_W1A2": TwoSets(*_BIT, f"int2_full {_ELASTIC}", f"uint2 {_ELASTIC}"),
    "BIT_W1A1": TwoSets(*_BIT, f"binary {_ELASTIC}", f"uint1 {_ELASTIC}"),
    "TBT_W2A8": TwoSets(*_TERNARY, *_EIGHT),
    "TBT_W2A2": TwoSets(*_TERNARY, f"ternary {_ELASTIC}", f"uternary {_ELASTIC}"),
    "TBT_W1A8": TwoSets(*_BINARY, *_EIGHT),
    "TBT_W1A1": TwoSets(*_BINARY, f"binary {_ELASTIC}", f"uint1 {_ELASTIC}"),
    **{f"OFQ_W{bits}A{bits}": _ofq(bits) for bits in (2, 3, 4)},
}
