"""What the quality benchmark compares: a name, and the recipe and scheme behind it. New methods add rows here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantized model.

    Attributes:
        recipe: a recipe's name. weights, inputs: quantizer lines; inputs None leaves them in float.
        effort: quick or full. bits: embeddings/weights/activations, for tables.
    """

    recipe: str
    weights: str
    inputs: str | None = None
    effort: str = "full"
    bits: str


def _table() -> dict[str, Row]:
    """The rows of LLM-FP4's own table: min-max, searched, and searched with shifts; floating point and integers."""
    rows: dict[str, Row] = {}
    for bits, weights, inputs in (
        ("16/4/4", "4", "4"), ("16/4/8", "4", "8"), ("16/4/16", "4", None), ("16/6/6", "6", "6"), ("16/8/8", "8", "8"),
    ):  # fmt: skip
        fp_w, fp_a = FP[weights], None if inputs is None else FP[inputs]
        int_w, int_a = f"int{weights}", None if inputs is None else f"int{inputs}"

        def static(a: str | None, granularity: str = "tensor") -> str | None:
            return None if a is None else f"{a} {granularity} static"

        rows[f"min-max INT {bits}"] = Row(
            recipe="minmax-int", weights=f"{int_w} channel", inputs=static(int_a), bits=bits
        )
        rows[f"min-max FP {bits}"] = Row(recipe="minmax-fp", weights=f"{fp_w} channel", inputs=static(fp_a), bits=bits)
        rows[f"searched INT {bits}"] = Row(
            recipe="fp-baseline", weights=f"{int_w} channel", inputs=static(int_a), bits=bits
        )
        rows[f"FP baseline {bits}"] = Row(
            recipe="fp-baseline", weights=f"{fp_w} channel", inputs=static(fp_a), bits=bits
        )
        if inputs is not None:
            rows[f"LLM-FP4 {bits}"] = Row(
                recipe="llm-fp4", weights=f"{fp_w} channel", inputs=static(fp_a, "shifted"), bits=bits
            )
            rows[f"SmoothQuant INT {bits}"] = Row(
                recipe="smoothquant", weights=f"{int_w} channel", inputs=static(int_a), bits=bits
            )
    rows["GPTQ E2M1 g32"] = Row(recipe="gptq", weights="e2m1 group=32 scale_format=float16", bits="16/4/16")
    rows["GPTQ INT4 g64"] = Row(recipe="gptq", weights="int4 group=64 scale_format=float16", bits="16/4/16")
    rows["RTN E2M1 g32"] = Row(recipe="rtn", weights="e2m1 group=32 scale_format=float16", bits="16/4/16")
    rows["RTN NF4 64"] = Row(recipe="rtn", weights="nf4 flat=64", bits="16/4/16")
    rows["RTN NVFP4"] = Row(recipe="rtn", weights="nvfp4", inputs="nvfp4", bits="16/4/4")
    rows["GPTQ NVFP4"] = Row(recipe="gptq", weights="nvfp4", inputs="nvfp4", bits="16/4/4")
    rows["RTN MXFP4"] = Row(recipe="rtn", weights="mxfp4", inputs="mxfp4", bits="16/4/4")
    return rows


FP = {"4": "e2m1", "6": "e2m3", "8": "e4m3"}
ROWS = _table()
