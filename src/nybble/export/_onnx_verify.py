"""An ONNX file opened with onnxruntime: its codes, what it dequantizes them to, its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.export._onnx_layers import OPSET, Weight
from nybble.export._onnx_weights import coded
from nybble.export._source import Layer, Source


def versions() -> dict[str, str]:
    """Of what opens the files."""
    return {name: version(name) for name in ("onnx", "onnxruntime")}


def session(path: Path | bytes) -> Any:
    """A session on the CPU, one thread, silent; inputs that no QDQ node rounds stay in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    held = str(path) if isinstance(path, Path) else path
    return onnxruntime.InferenceSession(held, options, providers=["CPUExecutionProvider"])


def compare_weights(path: Path, source: Source) -> int:
    """Compare codes bit for bit, and what onnxruntime dequantizes them to; returns how many weights there are.

    Raises:
        FileError: the file doesn't open, or a weight differs.
    """
    import onnx

    count = 0
    with reading(f"{path} by onnx"):
        stored = onnx.load(path, load_external_data=False).graph.initializer
        held: Mapping[str, Any] = {tensor.name: tensor for tensor in stored}
    for layer in source.layers.values():
        for prefix in layer.weights:
            found = source.weight(layer, prefix)
            ours: Any = Weight(coded(found), _shape(source, layer))
            names = ("codes", "scale", "zero_point")
            parts = [_part(path.parent, held, layer.name, name, getattr(ours, name)) for name in names]
            codes = parts[0]
            wanted = np.asarray(ours.codes.view(torch.uint8).numpy()) if "FLOAT" in ours.kind else ours.codes.numpy()
            theirs = onnx.numpy_helper.to_array(codes)
            same = theirs.view(np.uint8) if "FLOAT" in ours.kind else theirs.astype(wanted.dtype)
            if onnx.TensorProto.DataType.Name(codes.data_type) != ours.kind or not np.array_equal(same, wanted):
                raise FileError(f"{path}: the codes of {layer.name} aren't what was written.")
            values = torch.from_numpy(_dequantized([part for part in parts if part is not None], ours))
            values = values.T if ours.turned else values.reshape(found.shape)
            if not torch.equal(values, found.dequantize()):
                raise FileError(f"{path}: onnxruntime makes other values of {layer.name}.")
            count += 1
    return count


def _shape(source: Source, layer: Layer) -> tuple[int, ...] | None:
    """Of a convolution's or an embedding's weight; None of a linear layer."""
    if layer.kind.entry == "linear":
        return None
    module: Any = source.skeleton().get_submodule(layer.name)
    return tuple(module.weight.shape)


def _part(folder: Path, held: Mapping[str, Any], layer: str, name: str, value: Any) -> Any:
    """An initializer, with its bytes; torch's exporter keeps one of small ones that are equal."""
    import onnx

    if value is None:
        return None
    for inner in ("weight", "table"):
        if f"model.{layer}.{inner}.{name}" in held:
            return _filled(held[f"model.{layer}.{inner}.{name}"], folder)
    wanted = value.float().numpy()
    for tensor in held.values():
        if tuple(tensor.dims) == wanted.shape:
            found = _filled(tensor, folder)
            if np.array_equal(onnx.numpy_helper.to_array(found).astype(np.float32), wanted):
                return found
    raise FileError(f"the ONNX file has no {name} of {layer}.")


def _filled(tensor: Any, folder: Path) -> Any:
    """A tensor, its bytes read if they stand in a file beside."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    if not uses_external_data(tensor):
        return tensor
    found = onnx.TensorProto()
    found.CopyFrom(tensor)
    with reading(f"{folder} by onnx"):
        load_external_data_for_tensor(found, str(folder))
    found.ClearField("external_data")
    found.data_location = onnx.TensorProto.DEFAULT
    return found


def _dequantized(parts: list[Any], ours: Weight) -> Any:
    from onnx import TensorProto, helper

    where: dict[str, Any] = ours.where
    node = helper.make_node("DequantizeLinear", [part.name for part in parts], ["values"], **where)
    output = helper.make_tensor_value_info("values", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "weight", [], [output], parts)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    with reading("a weight by onnxruntime"):
        return session(model.SerializeToString()).run(None, {})[0]


@torch.no_grad()
def compare_outputs(path: Path, model: Any, given: Mapping[str, Tensor]) -> tuple[float, float]:
    """Cosine and largest relative difference of the first output to nybble's.

    Raises:
        FileError: the file doesn't run, or gives NaN or Inf.
    """
    with reading(f"{path} by onnxruntime"):
        theirs = session(path).run(None, {name: value.numpy() for name, value in given.items()})[0]
    ours = next(value for value in model(**given).values() if isinstance(value, Tensor))
    a, b = ours.double().flatten(), torch.from_numpy(theirs).double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))
    if not math.isfinite(cosine):
        raise FileError(f"{path}: the outputs of what was written hold NaN or Inf.")
    return cosine, float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
