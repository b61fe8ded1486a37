"""What is done to a graph that torch's exporter made, before it is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nybble.export._onnx_layers import Weight
from nybble.export._onnx_weights import RANGES

MARK = "nybble.layer"
"""The node that gives a quantized layer's output has the layer's name under this key."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def mark_layers(graph: Any, layers: Iterable[str]) -> None:
    """Leave, of all that the exporter says of nodes and values, the name of the layer whose output a node gives."""
    scopes = {id(node): set(_scopes(node)) for node in graph}
    last: dict[str, Any] = {}
    wanted = {f"model.{name}": name for name in layers}
    for node in graph:
        for scope in scopes[id(node)] & wanted.keys():
            outside = any(scope not in scopes[id(user)] for value in node.outputs for user, _ in value.uses())
            if outside or any(value.is_graph_output() for value in node.outputs):
                last[scope] = node
    for node in graph:
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for scope, node in last.items():
        node.metadata_props[MARK] = wanted[scope]


def _scopes(node: Any) -> list[str]:
    import ast

    found: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return found


def retype(graph: Any, name: str, weight: Weight) -> None:
    """Give codes of fewer than eight bits their own type, in which two or four share a byte."""
    if weight.kind not in RANGES or weight.kind.endswith("8"):
        return
    import ml_dtypes
    import onnx_ir as ir

    for inner in ("weight", "table"):
        for part in ("codes", "zero_point"):
            value = graph.initializers.get(f"model.{name}.{inner}.{part}")
            if value is not None and value.const_value is not None:
                kind = ir.DataType[weight.kind]
                narrow = value.const_value.numpy().astype(getattr(ml_dtypes, weight.kind.lower()))
                value.const_value = ir.Tensor(narrow, dtype=kind, name=value.name)
                value.dtype = kind
