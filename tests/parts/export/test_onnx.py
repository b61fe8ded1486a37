"""The target onnx: onnxruntime has our codes, makes our values of them, and computes what nybble does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.export.folders import model, quantized

from nybble.core.errors import FileError, ModelError, SchemeError
from nybble.export._onnx_weights import coded, form_of
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize
from nybble.quantizer import Quantizer

NEEDS = ("onnx", "onnxscript", "onnxruntime")
runs = pytest.mark.skipif(any(find_spec(name) is None for name in NEEDS), reason="pip install 'nybble[onnx]'")
IDS = torch.arange(8 * 16).view(8, 16)


def made(family: str, out: Path, **changes: Any) -> Path:
    data = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) if family == "resnet" else IDS
    quantize(str(model(family)), "rtn", out=out, data=data, **changes)
    return out


@runs
@pytest.mark.filterwarnings("ignore")  # torch's exporter and onnx_ir are full of them
@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("bert", {"weights": "int8 channel", "activations": "int8 static"}, "INT8"),
        ("bert", {"weights": "int4 group=16 symmetric=false", "embeddings": "int8 channel"}, "INT4"),
        ("bert", {"weights": "float8_e4m3fn channel", "activations": "float8_e4m3fn static"}, "FLOAT8E4M3FN"),
        ("resnet", {"weights": "int8 channel", "activations": "uint8 symmetric=false static"}, "INT8"),
        ("bert", {"weights": "int2 group=16", "activations": "int8 token"}, "INT4"),
    ],
    ids=["w8a8", "w4", "fp8", "cnn", "w2a8"],
)
def test_onnxruntime_computes_the_same(family: str, changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    import onnx

    done = export(made(family, tmp_path / "out", **changes), tmp_path / "d", "onnx", check=True)
    checked = done["check"]
    assert checked["weights"] > 7 and checked["exact_in"] == "float32"
    assert checked["cosine"] > 0.999
    held = onnx.load(tmp_path / "d" / "model.onnx").graph.initializer
    found = [tensor for tensor in held if tensor.name.endswith("weight.codes")]
    assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in found} == {kind}


@runs
@pytest.mark.filterwarnings("ignore")
def test_a_changed_code_is_found(tmp_path: Path) -> None:
    import onnx

    from nybble.export._onnx_verify import compare_weights
    from nybble.export._source import FolderSource

    folder = quantized("bert", weights="int8 channel")
    export(folder, tmp_path / "d", "onnx")
    path = tmp_path / "d" / "model.onnx"
    with FolderSource(folder) as source:
        assert compare_weights(path, source) == 14
        held = onnx.load(path)
        codes = next(t for t in held.graph.initializer if t.name.endswith("key.weight.codes"))
        codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
        onnx.save(held, path)
        with pytest.raises(FileError, match=r"the codes of .*key aren't what was written"):
            compare_weights(path, source)


@pytest.mark.parametrize(
    ("line", "kind", "block"),
    [
        ("int8", "INT8", -1), ("int8 channel", "INT8", 0), ("int4 group=16", "INT4", 16), ("uint4 channel", "UINT4", 0),
        ("int4 block=4x16", "INT4", 16), ("int3 flat=16", "INT4", 16), ("int8 flat=64", "INT8", 0),
        ("ternary channel", "INT4", 0), ("int8 channel symmetric=false", "INT8", 0), ("binary channel", "INT4", 0),
    ],
)  # fmt: skip
def test_every_cut_that_has_pieces_of_rows(line: str, kind: str, block: int) -> None:
    """The formula of DequantizeLinear over what is written gives what nybble dequantizes."""
    tensor = Quantizer(line).quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)))
    assert (form_of(tensor).kind, form_of(tensor).block) == (kind, block)
    found = coded(tensor)
    codes, scale, zero = found.codes.float(), found.scale, found.zero_point
    zero = torch.zeros_like(scale) if zero is None else zero.float()
    if block > 0:
        scale, zero = scale.repeat_interleave(block, 1), zero.repeat_interleave(block, 1)
    elif block == 0:
        scale, zero = scale[:, None], zero[:, None]
    assert torch.equal((codes - zero) * scale, tensor.dequantize())


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    for changes, words in (
        ({"weights": "nf4"}, r"onnx can't hold nf4.*it takes int4 group=32"),
        ({"weights": "mxfp4"}, r"no kernels"),
        ({"weights": "int8", "activations": "int8 group=16"}, r"int8 group=16.*it takes int8 static"),
    ):
        with pytest.raises(SchemeError, match=words):
            made("bert", tmp_path / "no", target="onnx", **changes)
    with pytest.raises(ModelError, match=r"generates token by token; it takes encoders.*compressed-tensors"):
        export(quantized("llama", weights="int8 channel"), tmp_path / "d", "onnx")
    with pytest.raises(ModelError, match=r"(?s)can't hold this model.*nf4.*it takes int4 group=32"):
        export(quantized("bert", weights="nf4"), tmp_path / "d", "onnx")
    assert not (tmp_path / "d").exists() and not (tmp_path / "no").exists()
