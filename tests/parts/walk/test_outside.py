"""What is in no block: an untied head sees its inputs, also static ones; settings are honoured or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import logits, save_text, save_tiny, tiny_model, tiny_tokenizer

import nybble
from nybble.calibration.spans import Span, spans
from nybble.core.errors import UsageError
from nybble.data import load_text, token_samples
from nybble.nn.linear import QuantLinear
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe

SETTINGS = nybble.Settings(samples=6, seq_len=12, batch=2, dtype=torch.float32)


def recipe(solver: str, **scheme: Any) -> Any:
    return parse_recipe({"name": "made", "scheme": {"ignore": [], **scheme}, "steps": [{"solver": solver}]})


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_an_untied_head_is_solved_on_its_inputs(tmp_path: Path, family: str) -> None:
    """GPTQ's objective is the head's output error: it beats rounding there, and weights alone are rounded worse."""
    changes = {} if family == "mistral" else {"tie_word_embeddings": False}
    folder, text = save_tiny(tmp_path / "m", family, **changes), str(save_text(tmp_path / "text.txt"))
    model, report = nybble.quantize(folder, recipe("gptq", weights="int4 group=16"), text, settings=SETTINGS)
    row = next(row for row in report.layers if row.name == "lm_head")
    assert row.error is not None and row.rtn_error is not None and row.error < 0.9 * row.rtn_error
    head = model.lm_head
    assert isinstance(head, QuantLinear)
    exact = nybble.load(folder, dtype=torch.float32)[0]
    plain, _ = nybble.quantize(folder, recipe("rtn", weights="int4 group=16"), text, settings=SETTINGS)
    hidden = exact.model(torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(9)))[0].flatten(0, 1)
    with torch.no_grad():
        wanted = exact.lm_head(hidden)
        errors = [float((m.lm_head(hidden) - wanted).square().sum()) for m in (model, plain)]
    assert errors[0] < errors[1]


def test_static_inputs_of_a_head_are_calibrated(tmp_path: Path) -> None:
    folder, text = save_tiny(tmp_path / "m", "mistral"), str(save_text(tmp_path / "text.txt"))
    made = recipe("rtn", weights="int8 channel", inputs="int8 tensor static")
    out, report = nybble.quantize(folder, made, text, out=tmp_path / "out", settings=SETTINGS)
    row = next(row for row in report.layers if row.name == "lm_head")
    assert row.input_scale is not None
    quantized, exact = nybble.load(out)[0], nybble.load(folder, dtype=torch.float32)[0]
    seen: list[torch.Tensor] = []
    exact.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = token_samples(load_text(text, "calibration"), tiny_tokenizer(), samples=6, seq_len=12, seed=0)
    with torch.no_grad():
        exact(tokens.input_ids)
    largest = float(torch.cat(seen).abs().max())
    assert 0.7 * largest < row.input_scale * 127 < 1.4 * largest  # of the quantized network's hidden states
    assert float((logits(quantized) - logits(exact)).norm()) < 0.1 * float(logits(exact).norm())


def test_a_head_is_rounded_from_what_the_file_has(tmp_path: Path) -> None:
    """Forwards are in bfloat16; the codes are those of the float32 weight."""
    folder = save_tiny(tmp_path / "m", "mistral", dtype=torch.float32)
    settings = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.bfloat16)
    model, _ = nybble.quantize(folder, recipe("rtn", weights="int8 channel"), settings=settings)
    exact = nybble.load(folder, dtype=torch.float32)[0]
    wanted = Quantizer("int8 channel").quantize(exact.lm_head.weight.detach()).dequantize()
    assert torch.equal(model.lm_head.weight.qtensor().dequantize(), wanted)


def test_settings_of_a_model_in_memory() -> None:
    model, made = tiny_model("llama", torch.float32), recipe("rtn", weights="int8 channel", ignore=["lm_head"])
    _, report = nybble.quantize(model, made)
    assert report.manifest["settings"]["dtype"] == "torch.float32"  # what it is, not what a default says
    assert report.manifest["settings"]["device"] == "cpu"
    assert report.manifest["name"] == "LlamaForCausalLM"
    model = tiny_model("llama", torch.float32)
    with pytest.raises(UsageError, match=r"is quantized as it is, torch.float32 on cpu; .* torch.bfloat16"):
        nybble.quantize(model, made, settings=nybble.Settings(dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="resume goes on from what a killed run left"):
        nybble.quantize(model, made, settings=nybble.Settings(resume=True))


def test_the_manifest_has_the_name_that_people_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe("rtn", weights="int8 channel", ignore=["lm_head"])
    folder = save_tiny(tmp_path / "Tiny-1B")
    assert nybble.quantize(folder, made)[1].manifest["name"] == "Tiny-1B"
    monkeypatch.chdir(folder)
    assert nybble.quantize(".", made)[1].manifest["name"] == "Tiny-1B"
    model = type(tiny_model()).from_pretrained(folder)
    assert nybble.quantize(model, made)[1].manifest["name"] == "Tiny-1B"
    cached = save_tiny(tmp_path / "models--some--model" / "snapshots" / "12fd25f")
    assert nybble.quantize(cached, made)[1].manifest["name"] == "some/model"


def test_hidden_states_are_spilled_in_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = save_tiny(tmp_path / "m"), str(save_text(tmp_path / "text.txt"))
    made: list[str] = []
    reserve = torch.from_file

    def noted(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(name)
        return reserve(name, *args, **kwargs)

    monkeypatch.setattr(torch, "from_file", noted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plain = nybble.quantize(
        folder, recipe("gptq", weights="int4 group=16", ignore=["lm_head"]), text, settings=SETTINGS
    )
    assert not made
    settings = nybble.Settings(samples=6, seq_len=12, batch=2, dtype=torch.float32, spill=True)
    spilled = nybble.quantize(
        folder, recipe("gptq", weights="int4 group=16", ignore=["lm_head"]), text, settings=settings
    )
    assert made and not list(tmp_path.glob("nybble-*"))
    assert torch.equal(logits(plain[0]), logits(spilled[0]))


def test_windows_cover_every_block_once() -> None:
    assert list(spans([5], 2, 1)) == [Span(0, 2, 1), Span(1, 3, 2), Span(2, 4, 3), Span(3, 5, 5)]
    assert list(spans([5], 2, 0)) == [Span(0, 2, 2), Span(2, 4, 4), Span(4, 5, 5)]
    assert list(spans([2, 3], 4, 2)) == [Span(0, 2, 2), Span(2, 5, 5)]  # none reaches into the next stack
    for sizes, window, overlap in (([7], 3, 2), ([4, 4], 3, 1), ([1], 5, 0)):
        left = [i for span in spans(sizes, window, overlap) for i in range(span.start, span.leave)]
        assert left == list(range(sum(sizes)))
