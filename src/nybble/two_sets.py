"""Schemes of binary and ternary encoders and translators by name: signed places, and those that are never negative.

Softmax's output and what enters the second layer of each MLP have values of their own, {0, a} where others have
{-a, a}: BiT (Liu et al. 2022, arXiv:2205.13016) and TBT (Liu et al. 2023, arXiv:2306.01841). Weights and embeddings
have one width, the second number is that of activations: ``BIT_W1A2`` is 1-1-2 in BiT's words, ``TBT_W2A8`` TBT's
2-2-8. Position and token type embeddings, norms and the last layer of a head stay in float.
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


class TwoSets(NamedTuple):
    """Lines of weights, of embeddings' tables, of activations with a sign and without."""

    weights: str
    tables: str
    signed: str
    unsigned: str

    def to_dict(self) -> dict[str, Any]:
        """The scheme, as YAML would hold it."""
        rules = [
            {"targets": [SECOND], "weights": self.weights, "inputs": self.unsigned},
            {"targets": ["Linear"], "weights": self.weights, "inputs": self.signed},
            {"targets": ["Embedding"], "weights": self.tables},
            {"targets": ["Attention"], "matmuls": f"{self.signed} probabilities=({self.unsigned})"},
        ]
        return {"rules": rules, "ignore": [FLOAT, "lm_head"]}


_ELASTIC = "tensor static scale=elastic"
_BIT = ("binary tensor scale=mean", "binary channel scale=mean")
_TERNARY, _BINARY = ("ternary channel scale=max-entropy",) * 2, ("binary channel scale=mean",) * 2
_EIGHT = ("int8 tensor scale=clamped", "uint8 tensor symmetric=false")

TWO_SETS: dict[str, TwoSets] = {
    "BIT_W1A4": TwoSets(*_BIT, f"int4_full {_ELASTIC}", f"uint4 {_ELASTIC}"),
    "BIT_W1A2": TwoSets(*_BIT, f"int2_full {_ELASTIC}", f"uint2 {_ELASTIC}"),
    "BIT_W1A1": TwoSets(*_BIT, f"binary {_ELASTIC}", f"uint1 {_ELASTIC}"),
    "TBT_W2A8": TwoSets(*_TERNARY, *_EIGHT),
    "TBT_W2A2": TwoSets(*_TERNARY, f"ternary {_ELASTIC}", f"uternary {_ELASTIC}"),
    "TBT_W1A8": TwoSets(*_BINARY, *_EIGHT),
    "TBT_W1A1": TwoSets(*_BINARY, f"binary {_ELASTIC}", f"uint1 {_ELASTIC}"),
}
