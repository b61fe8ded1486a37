"""Layers packed by GPTQModel, AutoAWQ and auto-round themselves, and what their own code reads out of them.

    PYTHONPATH=.:src:$PEERS python benchmarks/peers/words.py tests/parts/models/layouts/words.safetensors

PEERS holds gptqmodel 7.7.0, autoawq 0.2.9 (both unpacked; pure Python is enough) and auto-round 0.16.1, with what they
import. Of a case NAME the file has the tensors ``NAME/leaf``; its metadata says in ``NAME`` the quantization_config
that the peer writes, and the sha256 of the float16 weight [out, in] by the peer's own dequantizer, -0 counted as 0.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, COLUMNS = 32, 64
Case = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]


def drawn(bits: int, size: int, *, sym: bool, order: bool, least: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A layer on a grid; scales and zero points [out, groups]; the group of each column."""
    g = torch.Generator().manual_seed(bits)
    size = COLUMNS if size < 0 else size
    groups = COLUMNS // size
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=g)
    zeros = torch.randint(least, 1 << bits, (ROWS, groups), generator=g)
    if sym:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = (torch.rand(ROWS, groups, generator=g) * 0.1 + 0.01).half().float()
    index = torch.arange(COLUMNS) // size
    index = index[torch.randperm(COLUMNS, generator=g)] if order else index
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = scales[:, index] * (codes - zeros[:, index])
    return layer, scales, zeros, index.int()


def gptqmodel() -> Iterator[Case]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module as to_v2
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module as to_v1

    forms = [("gptq", b) for b in (2, 3, 4, 8)] + [("gptq_v2", b) for b in (2, 3, 4)]
    for form, bits in [*forms, *(("gptq_p", b) for b in (3, 4, 5, 6, 7))]:
        for sym, order in ((False, False), (False, True)) if bits in (3, 4) else ((bits == 8, False),):
            config = QuantizeConfig(bits=bits, group_size=32, desc_act=order, sym=sym, format=form)
            made: dict[str, Any] = {
                "bits": bits, "group_size": 32, "sym": sym, "desc_act": order, "in_features": COLUMNS,
                "out_features": ROWS,
            }  # fmt: skip
            layer, scales, zeros, index = drawn(bits, 32, sym=sym, order=order)
            packer = TorchLinear(**made, format=form)
            packer.pack_original(layer, scales, zeros, index)
            if form == "gptq":
                to_v1(packer, config)
            stored = {k: getattr(packer, k).clone() for k in ("qweight", "qzeros", "scales", "g_idx")}
            reader = TorchLinear(**made, format=form)
            for key, value in stored.items():
                setattr(reader, key, value.clone())
            if form == "gptq":
                to_v2(reader, bits, torch.int32)
            reader.post_init()
            name = f"gptqmodel {form} {bits} bits{' sym' if sym else ''}{' in another order' if order else ''}"
            said = {k: v for k, v in config.to_dict().items() if k != "meta"}
            yield name, said, stored, reader.dequantize_weight().T.half()


def autoawq() -> Iterator[Case]:
    place = next(Path(p, "awq") for p in sys.path if Path(p, "awq/modules/linear/gemm.py").is_file())
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):  # their __init__ import models that are gone
        package = types.ModuleType(name)
        package.__path__ = [str(place.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for size in (16, 32, 64):
        layer, scales, zeros, _ = drawn(4, size, sym=False, order=False)
        made = WQLinear_GEMM.from_linear(layer, 4, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        stored = {k: getattr(made, k).clone() for k in ("qweight", "qzeros", "scales")}
        said = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
        values = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, size)
        yield f"autoawq groups of {size}", said, stored, values.T.half()


def auto_round() -> Iterator[Case]:
    """Of whole exported folders the first layer; read by the layer class that the exporter packed it with."""
    import tempfile

    from auto_round import AutoRound
    from safetensors.torch import load_file
    from tests.tiny import tiny_model, tiny_tokenizer

    asked = [("auto_gptq", b, s) for b, s in ((2, True), (3, True), (4, True), (4, False), (8, True))]
    asked += [("auto_round", 2, False), ("auto_round", 3, False), ("auto_round", 4, True), ("auto_round", 4, False)]
    asked += [("auto_awq", 4, True), ("auto_awq", 4, False), ("auto_round:auto_awq", 4, False)]
    for form, bits, sym in asked:
        model = tiny_model(
            "llama", hidden_size=COLUMNS, intermediate_size=ROWS, num_hidden_layers=1, attention_bias=False
        )
        with tempfile.TemporaryDirectory() as room:
            work = AutoRound(model, tiny_tokenizer(), bits=bits, sym=sym, group_size=32, iters=0, disable_opt_rtn=True)
            work.quantize_and_save(room, format=form)
            (path,) = Path(room).rglob("config.json")
            said = json.loads(path.read_text())["quantization_config"]
            tensors = load_file(next(path.parent.glob("*.safetensors")))
        module = "model.layers.0.mlp.up_proj."
        stored = {k.removeprefix(module): t for k, t in tensors.items() if k.startswith(module)}
        yield f"auto-round {form} {bits} bits{' sym' if sym else ''}", said, stored, _round_reads(said, stored)


def _round_reads(said: dict[str, Any], stored: dict[str, Tensor]) -> Tensor:
    form = said.get("packing_format", said["quant_method"])
    bits, size = said["bits"], said["group_size"]
    if "awq" in form:
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        return dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], bits, size).T.half()
    if "gptq" in form:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    reader = QuantLinear(bits, size, COLUMNS, ROWS, False, g_idx="g_idx" in stored)
    reader.load_state_dict(stored, strict=False)
    return reader(torch.eye(COLUMNS, dtype=torch.float16)).T.half()


def main() -> None:
    tensors: dict[str, Tensor] = {}
    said: dict[str, str] = {}
    for peer, cases in (("gptqmodel", gptqmodel), ("torch", autoawq), ("auto_round", auto_round)):
        assert find_spec(peer), peer
        for name, config, stored, values in cases():
            assert values.shape == (ROWS, COLUMNS) and values.abs().sum() > 0, name
            tensors |= {f"{name}/{leaf}": t.detach().contiguous() for leaf, t in stored.items()}
            values = values.detach() + 0  # a product with a unit matrix, as auto-round is asked, has no -0
            digest = hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
            said[name] = json.dumps({"quantization_config": config, "sha256": digest}, default=str, sort_keys=True)
            print(name)
    save_file(tensors, sys.argv[1], said)


if __name__ == "__main__":
    main()
