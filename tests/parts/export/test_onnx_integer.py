"""The target onnx:integer: onnxruntime's integer operators come to the integer network's logits, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.export.folders import model
from tests.parts.nn.integer.test_network import BASIC, SIGNED, W4A4, W8A8, images, network

from nybble.core.errors import FileError, ModelError, SchemeError
from nybble.export._onnx_integer import compare_integer_graph, write_integer_graph
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize

NEEDS = ("onnx", "onnxscript", "onnxruntime")
runs = pytest.mark.skipif(any(find_spec(name) is None for name in NEEDS), reason="pip install 'nybble[onnx]'")
INTEGERS = {"INT32", "INT64", "UINT8", "UINT64"}


@runs
@pytest.mark.parametrize(("kind", "lines"), [(BASIC, W8A8), (BASIC, SIGNED), ("mobilenet", W4A4)])
def test_onnxruntime_has_the_same_logits(kind: str, lines: tuple[str, str], tmp_path: Path) -> None:
    net = network(kind, lines)
    write_integer_graph(net, tmp_path / "model.onnx")
    compare_integer_graph(tmp_path / "model.onnx", net, images(5, seed=7))
    compare_integer_graph(tmp_path / "model.onnx", net, 40 * images(1, seed=8))  # at the ends of every code


@runs
def test_nothing_between_the_rounded_image_and_the_logits_codes_is_a_float(tmp_path: Path) -> None:
    import onnx

    write_integer_graph(network(BASIC), tmp_path / "model.onnx")
    found = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"), strict_mode=True).graph
    types = [onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in found.value_info]
    floats_ = [name for name in types if name not in INTEGERS]
    assert floats_ == ["FLOAT"] * 3 + ["DOUBLE"] * 2 and len(types) > 200
    kinds = [node.op_type for node in found.node]
    assert kinds.count("ConvInteger") == 10 and kinds.count("MatMulInteger") == 1


@runs
def test_other_logits_are_found(tmp_path: Path) -> None:
    import onnx

    net, path = network(BASIC), tmp_path / "model.onnx"
    write_integer_graph(net, path)
    held = onnx.load(path)
    last = next(t for t in reversed(held.graph.initializer) if t.data_type == onnx.TensorProto.INT32)
    last.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(last) + 1, last.name))
    onnx.save(held, path)
    with pytest.raises(FileError, match="not those of the integer network"):
        compare_integer_graph(path, net, images(2))


@runs
def test_a_folder_is_exported_and_checked(tmp_path: Path) -> None:
    quantize(str(model("resnet")), "hawq-v3", out=tmp_path / "out", data=images(8))
    done = export(tmp_path / "out", tmp_path / "d", "onnx:integer", check=True)
    assert done["check"]["weights"] == 9 and done["check"]["largest"] == 0 and "model.onnx" in done["files"]


@runs
def test_what_has_no_integer_graph_is_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"weights": "int8 channel", "activations": "int8 static"}
    quantize(str(model("bert")), "rtn", out=tmp_path / "bert", data=torch.arange(128).view(8, 16), **changes)
    with pytest.raises(ModelError, match=r"a BertFor\w+ has no integer graph"):
        export(tmp_path / "bert", tmp_path / "d", "onnx:integer")
    with pytest.raises(SchemeError, match="round ties up"):
        write_integer_graph(network(BASIC, ties="half-even"), tmp_path / "model.onnx")
    assert not (tmp_path / "d").exists() and not (tmp_path / "model.onnx").exists()
