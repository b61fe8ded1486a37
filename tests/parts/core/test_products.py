"""Products of 16-bit floats computed in float32: what changes, and what doesn't."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tests.tiny import save_text, save_tiny
from torch import Tensor
from torch.nn import functional

import nybble
from nybble.core.errors import UsageError
from nybble.core.matmul import fast_products
from nybble.core.products import product_dtype, products_in, wide
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.walk.settings import Settings

RECIPE = build_recipe("gptq", weights="int4 group=16")
CPU = torch.device("cpu")
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": functional.linear,
    "@": lambda x, w: x @ w.mT,
    "matmul": lambda x, w: torch.matmul(x, w.mT),
    "addmm": lambda x, w: torch.addmm(w[:, 0], x, w.mT),
    "bmm": lambda x, w: torch.bmm(x[None], w.mT[None]),
    "einsum": lambda x, w: torch.einsum("tc,oc->to", x, w),
    "conv1d": lambda x, w: functional.conv1d(x.mT[None], w[..., None]),
    "attention": lambda x, w: functional.scaled_dot_product_attention(x[None], x[None], value=x[None]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 48, generator=generator).to(dtype) for _ in range(2))
    expected = PRODUCTS[name](x.float(), w.float())
    with products_in(torch.float32):
        found = PRODUCTS[name](x, w)
        exact = PRODUCTS[name](x.float(), w.float())
    assert torch.equal(found, expected.to(dtype)) and found.dtype == dtype
    assert torch.equal(exact, expected)
    with products_in(dtype):
        assert torch.equal(PRODUCTS[name](x, w), PRODUCTS[name](x, w)) and not wide()


def test_few_rows_and_other_functions_stay() -> None:
    x, w = torch.rand(8, 64).bfloat16(), torch.rand(32, 64).bfloat16()
    plain = functional.linear(x, w), x.softmax(-1)
    with products_in(torch.float32):
        assert torch.equal(functional.linear(x, w), plain[0]) and torch.equal(x.softmax(-1), plain[1])
        before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        with fast_products(CPU):  # float32 is the faster one, so nothing is rounded
            assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
        assert wide()
    assert not wide()
    with fast_products(CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


def test_gradients_flow() -> None:
    x, w = torch.rand(64, 48).bfloat16(), torch.rand(16, 48).bfloat16().requires_grad_()
    with products_in(torch.float32):
        functional.linear(x, w).float().square().sum().backward()  # type: ignore[no-untyped-call]
    wide_w = w.detach().float().requires_grad_()
    functional.linear(x.float(), wide_w).bfloat16().float().square().sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None and wide_w.grad is not None and torch.equal(w.grad, wide_w.grad.bfloat16())


def test_only_16_bits_on_a_cpu_are_measured() -> None:
    assert product_dtype(CPU, torch.float32) == torch.float32
    assert product_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    assert product_dtype(CPU, torch.bfloat16) in (torch.bfloat16, torch.float32)
    threads = torch.get_num_threads()
    product_dtype.__globals__["_float32_is_faster"].cache_clear()
    product_dtype(CPU, torch.bfloat16)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("begun", [torch.float32, torch.bfloat16])
def test_a_resumed_run_keeps_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: torch.dtype
) -> None:
    model, text = save_tiny(tmp_path / "model", "llama", num_hidden_layers=3), save_text(tmp_path / "text.txt")

    class Stop(BaseException):
        pass

    class Bar:
        def start(self, total: int, what: str) -> None: ...

        def advance(self, n: int = 1, note: str = "") -> None:
            raise Stop

        def done(self) -> None: ...

    def run(out: Path, faster: torch.dtype, bar: Bar | None = None, resume: bool = False) -> None:
        monkeypatch.setattr("nybble.core.products.product_dtype", lambda device, dtype: faster)
        settings = Settings(samples=4, seq_len=16, batch=2, resume=resume)
        quantize(model, RECIPE, str(text), out=out, settings=settings, progress=bar)

    run(tmp_path / "whole", begun)
    with suppress(Stop):
        run(tmp_path / "out", begun, Bar())
    other = torch.bfloat16 if begun == torch.float32 else torch.float32
    run(tmp_path / "out", other, resume=True)
    for name in ("model.safetensors", "nybble.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "nybble.json").read_text())
    assert manifest["settings"]["products"] == str(begun) and manifest["settings"]["dtype"] == "torch.bfloat16"


def test_products_as_the_settings_ask(tmp_path: Path) -> None:
    model, text = save_tiny(tmp_path / "model", "llama"), save_text(tmp_path / "text.txt")
    made = {}
    for products in (torch.float32, torch.bfloat16):
        settings = Settings(samples=4, seq_len=16, products=products)
        made[products], report = nybble.quantize(str(model), RECIPE, str(text), settings=settings)
        assert report.manifest["settings"]["products"] == str(products)
    (wide_state, plain_state) = (each.state_dict() for each in made.values())
    assert {name: t.dtype for name, t in wide_state.items()} == {name: t.dtype for name, t in plain_state.items()}
    with pytest.raises(UsageError, match=r"products in torch\.float16 of tensors in torch\.bfloat16"):
        nybble.quantize(str(model), RECIPE, str(text), settings=Settings(seq_len=16, products=torch.float16))
    with pytest.raises(UsageError, match=r"products is torch\.int8; give float32, bfloat16 or float16"):
        Settings(products=torch.int8)
