"""Products of two activations: attention with rounded operands, in memory, on disk and loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import logits, save_text, save_tiny, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import nybble
from nybble.calibration.operands import SEQUENCES, see_operands
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.checkpoint.account import inspect
from nybble.core.errors import DataError, FileError, NybbleError, SchemeError
from nybble.data import load_text, token_samples
from nybble.matmul_format import OPERANDS, MatmulFormat
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.attention import (
    MatmulQuantizers,
    OperandWatch,
    attentions,
    quantized_attention,
    use_quantized_attention,
)
from nybble.nn.kinds import targets_of
from nybble.qtensor import QuantParams, dense
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, parse_recipe
from nybble.solvers import make_solver
from nybble.solvers._ladder import fractions
from nybble.solvers._layer_error import output_error

SCHEME: dict[str, Any] = {
    "rules": [
        {"matmuls": "float6_e2m3fn tensor static"},
        {"weights": "float6_e2m3fn channel", "inputs": "float6_e2m3fn shifted static"},
    ]
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe(scheme: dict[str, Any] | None = None, **options: Any) -> Recipe:
    step = {"solver": "llm-fp4", "grid": 10, "rounds": 1, **options}
    return parse_recipe({"name": "products", "scheme": scheme or SCHEME, "steps": [step]})


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_in_memory_on_disk_and_loaded(tmp_path: Path, family: str) -> None:
    folder, text = save_tiny(tmp_path / "float", family), save_text(tmp_path / "text.txt")
    settings = nybble.Settings(samples=4, seq_len=12, batch=2)
    nybble.quantize(str(folder), recipe(), str(text), out=tmp_path / "out", settings=settings)
    memory, report = nybble.quantize(str(folder), recipe(), str(text), settings=settings)
    model, _ = nybble.load(tmp_path / "out")
    auto: Any = AutoModelForCausalLM
    other = auto.from_pretrained(tmp_path / "out").eval()
    for found in (model, other):
        assert any(isinstance(module, MatmulQuantizers) for module in found.modules())
        assert torch.equal(logits(found), logits(memory))
    rows = [row for row in report.layers if ".matmuls." in row.name]
    assert len(rows) == 2 * len(OPERANDS) and all(row.input_scale for row in rows)
    without, _ = nybble.quantize(str(folder), recipe({"rules": SCHEME["rules"][1:]}), str(text), settings=settings)
    assert not torch.equal(logits(without), logits(memory))


def test_operands_apart(tmp_path: Path) -> None:
    """Probabilities in a format without a sign beside a line for the rest: in files, reports and numbers."""
    line = "int8 tensor static probabilities=(uint4 tensor static) value=(int8 token)"
    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    asked = parse_recipe({"name": "apart", "scheme": {"matmuls": line}, "steps": [{"solver": "rtn"}]})
    settings = nybble.Settings(samples=4, seq_len=12, batch=2)
    assert parse_recipe(asked.to_dict()).scheme.rules == asked.scheme.rules
    nybble.quantize(str(folder), asked, str(text), out=tmp_path / "out", settings=settings)
    model, _ = nybble.load(tmp_path / "out")
    parts: Any = next(module for module in model.modules() if isinstance(module, MatmulQuantizers))
    found = {name: str(parts.get_submodule(name).quantizer) for name in OPERANDS}
    wanted = MatmulFormat.parse(line)
    assert found == {name: str(quantizer) for name, quantizer in wanted.items()}
    assert found["probabilities"] == "uint4 static" and parts.query.scale > 0 and parts.value.scale is None
    x = torch.rand(1, 4, 6, 6) * 15 * parts.probabilities.scale
    assert len(parts("probabilities", x).unique()) == 16  # all codes, none of them wasted on negative numbers


def test_lines_of_operands() -> None:
    same = MatmulFormat.of(Quantizer("int8 tensor"))
    assert MatmulFormat.parse("int8 tensor") == same and str(same) == "int8" and not same.static
    apart = MatmulFormat.parse("query=(int8 token) key=(nvfp4) probabilities=(uint8 tensor static) value=(mxfp4)")
    assert apart.static and MatmulFormat.parse(str(apart)) == apart
    for line, words in (
        ("query=(int8 token) key=(int8 token)", "int8 token.*'.*: say one line.* probabilities has none"),
        ("query=(int8) key=(int8) probabilities=(int8) values=(int8)", "'values'.*Did you mean 'value'"),
        ("int8 values=(int8)", "values"),
    ):
        with pytest.raises(NybbleError, match=words):
            MatmulFormat.parse(line)


def test_their_scales_are_accounted_for_and_checked(tmp_path: Path) -> None:
    """One float32 a static operand, counted as scales, kept in float32 whatever the dtype, refused if it isn't."""
    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    settings = nybble.Settings(samples=4, seq_len=12, batch=2)
    for name, scheme in (("with", SCHEME), ("without", {"rules": SCHEME["rules"][1:]})):
        nybble.quantize(str(folder), recipe(scheme), str(text), out=tmp_path / name, settings=settings)
    found, plain = inspect(tmp_path / "with"), inspect(tmp_path / "without")
    assert found["bytes"]["scales"] - plain["bytes"]["scales"] == 4 * 2 * len(OPERANDS)
    for same in ("parameters", "quantized_parameters", "bits_per_quantized_weight"):
        assert found[same] == plain[same]
    assert found["bytes"]["unquantized"] == plain["bytes"]["unquantized"]
    file = tmp_path / "with" / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if ".matmuls." in name]
    assert len(names) == 2 * len(OPERANDS)
    model = nybble.load(tmp_path / "with", dtype=torch.bfloat16)[0]
    assert all(torch.equal(model.get_buffer(name), tensors[name]) for name in names)

    save_file({**tensors, names[0]: tensors[names[0]].half()}, file, {"format": "pt"})
    for use in (inspect, nybble.load):
        with pytest.raises(FileError, match=f"{re.escape(names[0])} should be F32"):
            use(tmp_path / "with")
    del tensors[names[0]]
    save_file(tensors, file, {"format": "pt"})
    for use in (inspect, nybble.load):
        with pytest.raises(FileError, match=re.escape(names[0])):
            use(tmp_path / "with")


def eager_attention_forward(  # as models name theirs
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(query @ key.mT / 8**0.5, -1)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


class TinyAttention(torch.nn.Module):
    is_causal, scaling = False, 8**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        assert eager_attention_forward is not None
        return quantized_attention(self, query, key, value)


def test_operands_are_what_the_quantizers_round() -> None:
    """Against the attention written out."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    quantizer = Quantizer("float4_e2m1fn tensor")
    module = TinyAttention()
    module.add_module("matmuls", MatmulQuantizers({name: ActivationQuantizer(quantizer) for name in OPERANDS}))
    found, seen = module(query, key, value)
    q, k, v = (quantizer.fake_quantize(x) for x in (query, key, value))
    p = torch.softmax(q @ k.mT / 8**0.5, -1)
    expected = (quantizer.fake_quantize(p) @ v).transpose(1, 2)
    assert torch.equal(found, expected)
    assert torch.equal(seen, p)  # as they were before rounding
    plain, _ = TinyAttention()(query, key, value)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_static_operands_are_calibrated_where_nothing_else_is(tmp_path: Path) -> None:
    """Weights alone need no data; an operand's one scale is that of what the float attention multiplies."""
    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    quantizer = Quantizer("int8 tensor static")
    scheme = {"rules": [{"matmuls": str(quantizer)}, {"weights": "int8 channel"}]}
    made = parse_recipe({"name": "products", "scheme": scheme, "steps": [{"solver": "rtn"}]})
    settings = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)
    _, report = nybble.quantize(str(folder), made, str(text), settings=settings)
    rows = {row.name: row.input_scale for row in report.layers if ".matmuls." in row.name}

    exact = nybble.load(folder, dtype=torch.float32)[0]
    use_quantized_attention(exact)
    seen: dict[str, Tensor] = {}
    for name, module in list(attentions(exact)):
        watch = OperandWatch(lambda operand, x, name=name: seen.update({f"{name}.matmuls.{operand}": x}))  # type: ignore[misc]
        module.add_module("matmuls", watch)
    tokens = token_samples(load_text(str(text), "calibration"), tiny_tokenizer(), samples=4, seq_len=12, seed=0)
    with torch.no_grad():
        exact(tokens.input_ids, use_cache=False)
    wanted = {name: float(dense(quantizer.fit(x).scale)) for name, x in seen.items()}  # type: ignore[arg-type]
    assert len(wanted) == 2 * len(OPERANDS)
    assert rows == {name: pytest.approx(scale, rel=1e-5) for name, scale in wanted.items()}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.calls = TinyAttention(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.attention(x, 2 * x, 3 * x)[0].transpose(1, 2)
        return found


def test_operands_of_the_first_sequences_are_seen() -> None:
    """In float32, batch by batch until there are enough; nothing stays in the block."""
    block, x = Block(), torch.randn(40, 3, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    target, call = targets_of(block)["attention"], BlockCall(index=0, args=(), kwargs={}, keyword=None, start=None)

    def see(*batches: Tensor) -> dict[str, Tensor]:
        return see_operands(block, target, "the attention", lambda: ((call, {HIDDEN: part}) for part in batches))

    probabilities = torch.softmax(x @ (2 * x).mT / 8**0.5, -1)
    wanted = {"query": x, "key": 2 * x, "probabilities": probabilities, "value": 3 * x}
    for size in (8, 12):
        block.calls = 0
        found = see(*torch.split(x, size))
        assert block.calls == 2 and found.keys() == wanted.keys()
        for name, operand in found.items():
            assert operand.dtype == torch.float32 and torch.equal(operand, wanted[name][:SEQUENCES].float())
    x[9, 0, 0, 0] = torch.inf
    with pytest.raises(DataError, match="the query of the attention holds NaN or Inf"):
        see(x)
    with pytest.raises(DataError, match="the attention was never called"):
        see()
    assert not hasattr(block.attention, "matmuls")


def test_operands_have_their_four_names() -> None:
    with pytest.raises(FileError, match="attention has the operands query, key, probabilities, value; got query"):
        MatmulQuantizers({"query": ActivationQuantizer(Quantizer("int8"))})


def test_search_of_a_product_beats_min_max() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 32, 16, generator=generator) for _ in range(2))
    left[..., 0] *= 20
    quantizer = Quantizer("float4_e2m1fn tensor static")

    def error(solver: str) -> float:
        (ql, pl), (qr, pr) = make_solver(solver, {}).solve_product(left, right, quantizer)
        return sum(
            output_error(a, ql.fake_quantize(a, pl), b, qr.fake_quantize(b, pr))
            for a, b in zip(left, right, strict=True)
        )

    assert error("llm-fp4") < 0.9 * error("rtn")


def test_a_product_is_searched_on_both_sides() -> None:
    """The last choice, the right operand's, is the best of all fractions for the left one as it is rounded by then."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 24, 16, generator=generator) ** 3 for _ in range(2))
    quantizer = Quantizer("float4_e2m1fn tensor static")
    (ql, pl), (qr, pr) = make_solver("llm-fp4", {"formats": False, "grid": 20}).solve_product(left, right, quantizer)
    given = ql.fake_quantize(left, pl)

    def error(params: QuantParams) -> float:
        rounded = qr.fake_quantize(right, params)
        return sum(output_error(*sides) for sides in zip(left, given, right, rounded, strict=True))

    most = dense(quantizer.fit(right).scale)  # type: ignore[arg-type]
    tried = [error(QuantParams(most * float(f))) for f in [1, *fractions(0.01, 1.2, 20, torch.device("cpu"))]]
    assert error(pr) == pytest.approx(min(tried), rel=1e-5) and min(tried) < 0.9 * tried[0]
    quick = make_solver("llm-fp4", {"formats": False, "grid": 40, "fine": 2}).solve_product(left, right, quantizer)
    for (_, params), x in zip(quick, (left, right), strict=True):  # fine steps alone come 8 % from the maximum
        assert float(dense(params.scale)) < 0.9 * float(dense(quantizer.fit(x).scale))  # type: ignore[arg-type]


def test_refusals(tmp_path: Path) -> None:
    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    for scheme, message in (
        ({"rules": [{"targets": ["Linear"], "matmuls": "int8 tensor static"}]}, "is a layer with a weight"),
        ({"rules": [{"targets": ["Attention"], "weights": "int8 channel"}]}, "products of activations only"),
        ({"rules": [{"matmuls": "e2m1 shifted static"}]}, "shifted columns need a weight"),
        ({"rules": [{"matmuls": "int8 tensor", "weights": "int8 tensor"}]}, "a rule of their own"),
    ):
        with pytest.raises(SchemeError, match=message):
            nybble.quantize(str(folder), recipe(scheme), str(text))
