"""BERT with widths of its layers' own: BERT at full width, narrower layers, a folder that nybble quantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.training.test_text_tasks import BERT, model

from nybble.models.adapter import adapter_for, reads_of
from nybble.models.own.bottleneck import BottleneckConfig, BottleneckForMaskedLM, of_bert
from nybble.nn.linear import QuantLinear
from nybble.pipelines.load import load
from nybble.pipelines.quantize import quantize

IDS = torch.tensor([[1, 7, 9, 4, 2], [1, 5, 2, 0, 0]])
MASK = (IDS != 0).long()


def test_at_full_width_it_is_bert() -> None:
    """transformers' own, bit for bit."""
    made = model("BertForMaskedLM", "bert", BERT)
    found: Any = of_bert(made)
    with torch.no_grad():
        expected = made(input_ids=IDS, attention_mask=MASK).logits
        assert torch.equal(found(input_ids=IDS, attention_mask=MASK).logits, expected)
        found.set_attn_implementation("eager")
        torch.testing.assert_close(found(input_ids=IDS, attention_mask=MASK).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(found(input_ids=IDS, output_attentions=True).attentions) == 2


def narrow() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = BottleneckForMaskedLM(BottleneckConfig(widths=[8, 16], **BERT))
    return made.eval()


def test_a_folder_of_narrow_layers_is_a_model_like_any_other(tmp_path: Path) -> None:
    made = narrow()
    shapes = [tuple(layer.layer.intermediate.dense.weight.shape) for layer in made.bert.encoder.layer]
    assert shapes == [(48, 8), (48, 16)] and reads_of(made) == "sentences"
    assert adapter_for(made).block_names(made) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    made.save_pretrained(tmp_path / "m")
    loaded: Any = BottleneckForMaskedLM.from_pretrained(tmp_path / "m")
    assert loaded.config.widths == [8, 16]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, made(input_ids=IDS).logits)
    quantize(tmp_path / "m", "rtn", out=tmp_path / "q", weights="int8 channel", settings={"dtype": "float32"})
    packed: Any = load(tmp_path / "q", dtype="float32")[0]
    assert isinstance(packed.bert.encoder.layer[0].layer.output.dense, QuantLinear)
    with torch.no_grad():
        difference = (packed(input_ids=IDS).logits - made(input_ids=IDS).logits).abs().max()
    assert 0 < float(difference) < 0.05 * float(made(input_ids=IDS).logits.detach().abs().max())


@pytest.mark.parametrize("widths", [[8], [8, 10], [8, 0]])
def test_widths_that_are_none(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="one for each of 2 layers, a multiple of 4 heads"):
        BottleneckConfig(widths=widths, **BERT)
