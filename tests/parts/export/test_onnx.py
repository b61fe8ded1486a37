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
    judged = checked["layerwise"]
    assert (judged["layers"] >= checked["weights"]) and (judged["codes"] > 9000) == ("activations" in changes)
    assert judged["worst"] < 0.001 and max(judged["largest"], judged["end"]) < 1e-5
    held = onnx.load(tmp_path / "d" / "model.onnx").graph.initializer
    found = [tensor for tensor in held if tensor.name.endswith("weight.codes")]
    assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in found} == {kind}


@runs
@pytest.mark.filterwarnings("ignore")
def test_what_was_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file whose tensors stand beside it: a code, a scale of inputs, a bias, something between layers."""
    import onnx

    from nybble.checkpoint.load import load_quantized
    from nybble.export._onnx_judge import judge_layers
    from nybble.export._onnx_verify import compare_weights
    from nybble.export._source import FolderSource

    monkeypatch.setattr("nybble.export.onnx.MOST", 1000)
    folder = made("bert", tmp_path / "out", weights="int8 channel", activations="int8 static")
    done = export(folder, tmp_path / "d", "onnx:int8", check=True)
    path = tmp_path / "d" / "model.onnx"
    assert done["files"]["model.onnx.data"] > 100_000 and done["check"]["layerwise"]["layers"] == 12
    model, ids = load_quantized(folder, torch.float32), IDS[:2]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    for name, words in (
        ("model.bert.encoder.layer.1.attention.self.key.weight.codes", r"the codes of .*key aren't what was written"),
        ("model.bert.encoder.layer.0.output.dense.inputs.scale", r"other codes of the inputs of .*0.output.dense: "),
        (
            "model.bert.encoder.layer.0.intermediate.dense.bias",
            r"from equal inputs, .*makes others of .*0.intermediate.dense, ",
        ),
        ("model.bert.embeddings.LayerNorm.weight", r"other codes of the inputs of .*0.attention.self.query"),
    ):
        held = onnx.load(path)
        tensor = next(t for t in held.graph.initializer if t.name == name)
        values = onnx.numpy_helper.to_array(tensor)
        changed = values ^ 1 if "codes" in name else values * 1.02 + (0.001 if "bias" in name else 0)
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed.astype(values.dtype), name))
        onnx.save(held, tmp_path / "changed.onnx")
        with FolderSource(folder) as source, pytest.raises(FileError, match=words):
            compare_weights(tmp_path / "changed.onnx", source)
            judge_layers(tmp_path / "changed.onnx", model, given)


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
        ({"weights": "nf4"}, r"onnx can't hold nf4.*it takes int4 group=32, int8 channel, float8_e4m3fn channel\."),
        ({"weights": "mxfp4"}, r"no kernels"),
        ({"weights": "int8", "activations": "int8 group=16"}, r"int8 group=16.*it takes int8 static"),
    ):
        with pytest.raises(SchemeError, match=words):
            made("bert", tmp_path / "no", target="onnx", **changes)
    said = r"generates token by token; it takes encoders.*compressed-tensors"
    with pytest.raises(ModelError, match=said):
        export(quantized("llama", weights="int8 channel"), tmp_path / "d", "onnx")
    for family in ("llama", "gpt2"):  # before anything is quantized too
        with pytest.raises(ModelError, match=said):
            made(family, tmp_path / "no", target="onnx", weights="int8 channel")
    with pytest.raises(ModelError, match=r"(?s)can't hold this model.*nf4.*it takes int4 group=32"):
        export(quantized("bert", weights="nf4"), tmp_path / "d", "onnx")
    assert not (tmp_path / "d").exists() and not (tmp_path / "no").exists()
