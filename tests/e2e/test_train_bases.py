"""``nybble train qlora`` over what other libraries packed: their codes stay, adapters train beside them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.models.layouts import test_bitsandbytes as bnb
from tests.parts.models.layouts import test_compressed_tensors as compressed
from tests.parts.models.layouts import test_gptq as gptq
from tests.parts.models.test_gguf_writer import tokenizer_of
from tests.tiny import WORDS, save_tiny, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import nybble
from nybble.core.errors import ModelError, UsageError
from nybble.nn.packed import Packed
from nybble.pipelines.export import export
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings

pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'train' brings")
adapters = pytest.importorskip("nybble.training.adapters")

pytestmark = [
    # PEFT asks transformers in words that its newest release calls old; older ones know no others.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LLM.int8 rounds activations too"),
]

SETTINGS = TrainSettings(steps=2, accumulate=2, seq_len=60, lr=0.02, dtype="float32")


def of_compressed_tensors(folder: Path) -> Path:
    return compressed.checkpoint(folder / "base", *compressed.CASES["pack int4 zeros"])[0]


def of_gptq(folder: Path) -> Path:
    return gptq.checkpoint(folder / "base", 4, 32, order=True)[0]


def of_bitsandbytes(folder: Path) -> Path:
    return bnb.checkpoint(folder, bnb.CASES["nf4 nested"])[0]


def of_int8(folder: Path) -> Path:
    return bnb.checkpoint(folder, bnb.CASES["int8"])[0]


def of_gguf(folder: Path) -> Path:
    save_tiny(folder / "float", hidden_size=64, intermediate_size=96, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "float" / name).unlink()  # of words, which a GGUF has no rules for
    tokenizer = tokenizer_of(size=264)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "float")
    nybble.quantize(str(folder / "float"), "rtn", weights="q4_0", embeddings="q8_0", out=folder / "q")
    export(folder / "q", folder / "d", "gguf")
    (file,) = (folder / "d").glob("*.gguf")
    return file


BASES: dict[str, Callable[[Path], Path]] = {
    "compressed-tensors": of_compressed_tensors,
    "GPTQ": of_gptq,
    "bitsandbytes": of_bitsandbytes,
    "LLM.int8": of_int8,
    "GGUF": of_gguf,
}


def data(folder: Path) -> str:
    rng, path = random.Random(0), folder / "data.jsonl"
    lines = []
    for _ in range(6):
        words = rng.choices(WORDS[3:13], k=3)
        lines.append(json.dumps({"instruction": " ".join(words), "output": " ".join(words[::-1])}))
    path.write_text("\n".join(lines))
    return str(path)


def codes(model: Any) -> list[torch.Tensor]:
    packed = [m for m in model.modules() if isinstance(m, Packed)]
    return [t for m in packed for t in m.qtensor().tensors().values()]


@pytest.mark.parametrize("library", BASES)
def test_over_what_others_packed(library: str, tmp_path: Path) -> None:
    base, rows = BASES[library](tmp_path), data(tmp_path)
    packed = library == "GGUF"
    found = train(
        "qlora", base, tmp_path / "out", rows, options={"rank": 2}, packed=packed, judged_on=rows, merge=True,
        settings=replace(SETTINGS, seq_len=120 if packed else 60),  # its tokenizer has a token a byte
    )  # fmt: skip
    models = found["evaluation"]["models"]
    assert found["weights"] is None and not (tmp_path / "out" / "base").exists()
    assert models["after"]["nll"] < models["before"]["nll"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    fresh, _ = load_with_origin(base, dtype="float32", packed=packed)
    was = codes(fresh)
    assert len(was) >= 28  # codes and scales of 14 layers
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        plain = fresh(input_ids=ids).logits
        adapted = adapters.load_adapter(fresh, tmp_path / "out")
        again = adapted(input_ids=ids).logits
        merged = nybble.load(tmp_path / "out" / "merged", dtype="float32")[0](input_ids=ids).logits
    assert all(torch.equal(a, b) for a, b in zip(was, codes(adapted), strict=True))
    assert not torch.equal(plain, again) and torch.allclose(merged, again, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_a_base(tmp_path: Path) -> None:
    rows = data(tmp_path)
    given: dict[str, Any] = {"data": rows, "options": {"rank": 2}, "settings": SETTINGS}
    float_model = save_tiny(tmp_path / "float", dtype=torch.float32)
    train("qlora", float_model, tmp_path / "first", **given)
    first = tmp_path / "first"
    with pytest.raises(UsageError, match=rf"would be packed anew; give that base as MODEL: {first / 'base'}\."):
        train("qlora", float_model, tmp_path / "out", adapter=first, **given)
    with pytest.raises(UsageError, match="--packed is for GGUF files"):
        train("qlora", float_model, tmp_path / "out", packed=True, **given)
    file = of_gguf(tmp_path / "gguf")
    with pytest.raises(UsageError, match=r"is packed already.*leave --weights out"):
        train("qlora", file, tmp_path / "out", packed=True, weights="nf4-dq", **given)
    small = {"vocab_size": 300, "num_hidden_layers": 1}
    bert = BertConfig(**small, hidden_size=32, num_attention_heads=2, intermediate_size=32)  # type: ignore[arg-type]
    t5 = T5Config(**small, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)  # type: ignore[arg-type]
    for model in (BertForSequenceClassification(bert), T5ForConditionalGeneration(t5)):
        other = tmp_path / type(model).__name__
        model.save_pretrained(other)
        tiny_tokenizer().save_pretrained(other)
        with pytest.raises(ModelError, match=r"causal language models.*\. Others take adapters in a loop of your"):
            train("qlora", other, tmp_path / "out", **given)
    shutil.rmtree(first / "base")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
