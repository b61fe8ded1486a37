"""Bias correction: every output channel keeps its mean over the real rows of each batch, whatever the rounding does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, save_tiny, tiny_tokenizer
from torch import Tensor, nn

import nybble
from nybble.calibration.error import relative_error
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.corrections import bias
from nybble.corrections.bias import correct_biases, output_means
from nybble.data import load_text, token_samples
from nybble.nn.packed import Packed
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe

LAYERS = {"first": False, "second": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(hidden_states)))
        return found


def call(mask: Tensor | None = None, **kwargs: Any) -> BlockCall:
    return BlockCall(index=0, args=(), kwargs=kwargs, keyword=None, start=None, mask=mask)


def test_biases_move_by_what_real_rows_lack_on_average() -> None:
    """Against the definition; a layer reads what those before it give once they are corrected."""
    generator = torch.Generator().manual_seed(1)
    exact = Block().requires_grad_(False)
    rounded = copy.deepcopy(exact)
    for layer in (rounded.first, rounded.second):
        layer.weight.copy_(Quantizer("int3 channel").fake_quantize(layer.weight))
    masks = [torch.tensor([[True] * 4, [True, False, False, False]]), torch.tensor([[True, True, False, False]]), None]
    inputs = [torch.randn(n, 4, 8, generator=generator) + 1 for n in (2, 1, 2)]
    for x, mask in zip(inputs, masks, strict=True):
        if mask is not None:
            x[~mask] = 100

    def batches() -> Iterator[tuple[BlockCall, dict[str, Tensor]]]:
        yield from ((call(mask), {HIDDEN: x}) for x, mask in zip(inputs, masks, strict=True))

    before = copy.deepcopy(rounded)
    moved = correct_biases(rounded, LAYERS, batches, output_means(exact, LAYERS, batches))
    lacking: dict[str, list[Tensor]] = {"first": [], "second": []}
    for x, mask in zip(inputs, masks, strict=True):
        rows = x.flatten(0, 1) if mask is None else x[mask]
        wanted, found = exact.first(rows), before.first(rows)
        lacking["first"].append((wanted - found).mean(0))
        wanted, found = exact.second(torch.tanh(wanted)), before.second(torch.tanh(found + lacking["first"][-1]))
        lacking["second"].append((wanted - found).mean(0))
    for name, lack in lacking.items():
        by = torch.stack(lack).mean(0)
        found = rounded.get_submodule(name).bias - before.get_submodule(name).bias  # type: ignore[operator]
        assert torch.allclose(found, by, atol=1e-5)  # float32 sums over rows of 100
        assert moved[name] == pytest.approx(float(by.abs().mean()), abs=1e-5)


def test_batches_are_merged_up_to_a_number_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "MOST", 70)
    images = torch.arange(150.0).view(5, 1, 30)

    def merged(**kwargs: Any) -> list[Tensor]:
        return [given[HIDDEN] for _, given in bias._large(lambda: [(call(**kwargs), {HIDDEN: x}) for x in images])()]

    found = merged()
    assert [len(x) for x in found] == [2, 2, 1] and torch.equal(torch.cat(found), images.flatten(0, 1))
    assert [len(x) for x in merged(attention_mask=torch.ones(1))] == [1] * 5  # it belongs to one batch


def test_errors_are_measured_anew_and_no_dense_copy_stays(tmp_path: Path) -> None:
    folder, text = save_tiny(tmp_path / "m"), str(save_text(tmp_path / "text.txt"))
    steps = [{"solver": "rtn"}, {"correction": "bias"}]
    recipe = parse_recipe({"name": "x", "scheme": {"weights": "int4 channel"}, "steps": steps})
    settings = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)
    model, report = nybble.quantize(folder, recipe, text, settings=settings)
    assert all(module._dense is None for module in model.modules() if isinstance(module, Packed))

    exact, seen = nybble.load(folder, dtype=torch.float32)[0], list[Tensor]()
    layer = exact.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        exact(token_samples(load_text(text, "calibration"), tiny_tokenizer(), samples=4, seq_len=12, seed=0).input_ids)
    row = next(row for row in report.layers if row.name == "model.layers.1.self_attn.q_proj")
    second, weight = seen[0].T @ seen[0] / len(seen[0]), layer.weight.detach()
    wanted = relative_error(weight, Quantizer("int4 channel").fake_quantize(weight), second)
    assert row.error == pytest.approx(wanted, rel=1e-4) and row.rtn_error == row.error
    assert "bias moved by" in row.notes[-1]
