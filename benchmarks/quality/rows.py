"""What the quality benchmark compares: a name, and the recipe and scheme behind it. New methods add rows here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantized model.

    Attributes:
        recipe: a recipe's name. weights, inputs, embeddings: quantizer lines; without weights the recipe's own scheme
            stands, else None leaves inputs and embeddings in float.
        effort: quick or full. bits: embeddings/weights/activations, for tables.
    """

    recipe: str
    weights: str | None = None
    inputs: str | None = None
    embeddings: str | None = None
    effort: str = "full"
    bits: str


def _table() -> dict[str, Row]:
    """The rows of LLM-FP4's own table: min-max, searched, and searched with shifts; floating point and integers."""
    rows: dict[str, Row] = {}
    for bits in ("16/4/4", "16/4/16", "4/4/4", "4/4/8", "4/4/16", "6/6/6", "8/8/8"):
        fp, integer = lines(bits, FP), lines(bits, {n: f"int{n}" for n in FP})
        rows[f"min-max INT {bits}"] = Row(recipe="minmax-int", bits=bits, **integer)
        rows[f"min-max FP {bits}"] = Row(recipe="minmax-fp", bits=bits, **fp)
        rows[f"searched INT {bits}"] = Row(recipe="fp-baseline", bits=bits, **integer)
        rows[f"FP baseline {bits}"] = Row(recipe="fp-baseline", bits=bits, **fp)
        if not bits.endswith("/16"):
            rows[f"LLM-FP4 {bits}"] = Row(recipe="llm-fp4", bits=bits, **lines(bits, FP, "shifted"))
            rows[f"SmoothQuant INT {bits}"] = Row(recipe="smoothquant", bits=bits, **integer)
    shifted = lines("16/4/4", FP, "shifted=4")
    rows["LLM-FP4 16/4/4 shifts of 4 bits"] = Row(recipe="llm-fp4", bits="16/4/4", **shifted)
    rows["GPTQ E2M1 g32"] = Row(recipe="gptq", weights="e2m1 group=32 scale_format=float16", bits="16/4/16")
    int4 = "int4_full group=64 scale=absmax(target=7.5) scale_format=float16"  # all sixteen values, as peers have it
    rows["GPTQ INT4 g64"] = Row(recipe="gptq", weights=int4, bits="16/4/16")
    rows["RTN E2M1 g32"] = Row(recipe="rtn", weights="e2m1 group=32 scale_format=float16", bits="16/4/16")
    rows["RTN NF4 64"] = Row(recipe="rtn", weights="nf4 flat=64", bits="16/4/16")
    rows["RTN NVFP4"] = Row(recipe="rtn", weights="nvfp4", inputs="nvfp4", bits="16/4/4")
    rows["GPTQ NVFP4"] = Row(recipe="gptq", weights="nvfp4", inputs="nvfp4", bits="16/4/4")
    for bits in (4, 3, 2):
        line = f"int{bits} group=64 symmetric=false"
        rows[f"RTN INT{bits} g64 asym"] = Row(recipe="rtn", weights=line, bits=f"16/{bits}/16")
        rows[f"GPTQ INT{bits} g64 asym"] = Row(recipe="gptq", weights=line, bits=f"16/{bits}/16")
    for target in ("w4a16", "w3a16", "w2a16", "w4a8", "nvfp4", "mxfp4"):
        weights, inputs = (target[1], target[3:]) if target.startswith("w") else ("4", "4")
        rows[f"best {target}"] = Row(recipe=f"best-{target}", bits=f"16/{weights}/{inputs}")
    rows["RTN MXFP4"] = Row(recipe="rtn", weights="mxfp4", inputs="mxfp4", bits="16/4/4")
    return rows


def lines(bits: str, formats: dict[str, str], columns: str = "tensor") -> dict[str, Any]:
    """Quantizer lines for bits of embeddings/weights/activations; ``columns`` is the granularity of activations."""
    e, w, a = bits.split("/")
    return {
        "weights": f"{formats[w]} channel",
        "inputs": None if a == "16" else f"{formats[a]} {columns} static",
        "embeddings": None if e == "16" else f"{formats[e]} channel",
    }


FP = {"4": "e2m1", "6": "e2m3", "8": "e4m3"}
ROWS = _table()
