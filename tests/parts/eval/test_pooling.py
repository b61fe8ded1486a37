"""Sentence encoders are judged by the embeddings that their own folder describes, and that description goes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.tiny import save_text, tiny_tokenizer
from torch import nn

import nybble
from nybble.core.errors import FileError
from nybble.data import sentence_samples
from nybble.data.text import load_text
from nybble.eval import embed
from nybble.eval._pooling import MODES, read_pooling
from nybble.models.sources.open import open_source
from nybble.pipelines.evaluate import run_eval
from nybble.walk.settings import Settings

KIND = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("cls", 2), ("max", 4), ("mean", 3), ("mean_sqrt_len_tokens", 6 / 2**0.5), ("weightedmean", 10 / 3),
     ("lasttoken", 4)],
)  # fmt: skip
def test_modes_know_padding_on_both_sides(mode: str, wanted: float) -> None:
    """Values of sentence-transformers 6.2."""
    hidden = torch.tensor([1.0, 2, 4, 8]).reshape(1, 4, 1)
    real = torch.tensor([[False, True, True, False]])
    assert float(MODES[mode](hidden, real)) == pytest.approx(wanted)


def encoder(folder: Path, pooling: dict[str, Any], more: list[str]) -> Path:
    """A BERT as sentence-transformers saves one: pooled, then through a layer of half the width, normalised."""
    make: Any = transformers.BertConfig
    config = make(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(1)
    cls: Any = transformers.BertModel
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    for number, kind in enumerate(("Pooling", "Dense", *more), start=1):
        (folder / f"{number}_{kind}").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    dense = {"in_features": 32, "out_features": 16, "activation_function": "torch.nn.modules.activation.ReLU"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)},
              folder / "2_Dense" / "model.safetensors")  # fmt: skip
    for made in folder.glob("*_Normalize"):
        (made / "config.json").write_text("{}")
    names = ["Transformer", "Pooling", "Dense", *more]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": KIND + k} for i, k in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (folder / "preprocessor_config.json").write_text('{"of": "another kind of data"}')
    return folder


def test_embeddings_are_pooled_as_the_folder_says(tmp_path: Path) -> None:
    place = encoder(tmp_path / "m", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["Normalize"])
    source = open_source(str(place))
    pooling = read_pooling(source)
    assert pooling.words == "cls, dense, normalized"
    model, ids = source.model(torch.float32), torch.arange(3, 19).reshape(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    dense = nn.Linear(32, 16)
    weights = transformers.modeling_utils.load_state_dict(str(place / "2_Dense" / "model.safetensors"))
    dense.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
    with torch.no_grad():
        first = model(ids, mask).last_hidden_state[:, 0]
        wanted = nn.functional.normalize(dense(first).relu(), dim=-1)
    found = embed(model, {"input_ids": ids, "attention_mask": mask}, pooling=pooling)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_side_files_go_along_and_their_loss_is_seen(tmp_path: Path) -> None:
    place = encoder(tmp_path / "m", {"pooling_mode": ["max", "lasttoken"]}, [])
    # A layer of a file that is not there any more: only the pooling is judged.
    listed = json.loads((place / "modules.json").read_text())
    (place / "modules.json").write_text(json.dumps(listed[:2]))
    text = str(save_text(tmp_path / "text.txt", 300))
    lines = Path(text).read_text().split()
    Path(text).write_text("\n".join(" ".join(lines[i : i + 9]) for i in range(0, 300, 10)))
    out, _ = nybble.quantize(str(place), "rtn", text, out=tmp_path / "q", settings=Settings(seq_len=12))
    assert isinstance(out, Path)
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json",
                 "preprocessor_config.json"):  # fmt: skip
        assert (out / name).read_bytes() == (place / name).read_bytes()

    def cosine() -> tuple[float, str]:
        found = run_eval({"q": str(out)}, text, reference=str(place), seq_len=12)
        return found["models"]["q"]["cosine"], found["data"]["pooling"]

    loaded, tokenizer = nybble.load(out)
    assert tokenizer is not None
    samples = sentence_samples(load_text(text, "evaluation"), tokenizer, samples=None, seq_len=12)
    by_hand = []
    for model in (open_source(str(place)).model(torch.bfloat16), loaded):
        with torch.no_grad():
            hidden = model(**samples.inputs).last_hidden_state.float()
        by_hand.append(torch.cat([hidden.amax(1), hidden[:, -1]], -1))  # all have nine words
    wanted = float(nn.functional.cosine_similarity(by_hand[0], by_hand[1], dim=-1).mean())
    found, words = cosine()
    assert words == "max+lasttoken"
    assert found == pytest.approx(wanted, abs=1e-4)
    (out / "modules.json").unlink()
    with pytest.raises(nybble.core.errors.ModelError, match="embeddings of 32 values"):
        cosine()


def test_what_is_behind_a_dropout_counts_and_a_residual_is_not_guessed(tmp_path: Path) -> None:
    place = encoder(tmp_path / "m", {"pooling_mode": "mean"}, ["Dropout", "Normalize"])
    found = read_pooling(open_source(str(place)))
    assert found.words == "mean, dense, normalized"
    pooled = found(torch.randn(3, 5, 32), None)
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(3))
    settings = json.loads((place / "2_Dense" / "config.json").read_text())
    (place / "2_Dense" / "config.json").write_text(json.dumps({**settings, "use_residual": True}))
    assert read_pooling(open_source(str(place))).words == "mean, Dense and what follows it left out"


def test_what_cannot_be_judged_is_named(tmp_path: Path) -> None:
    place = encoder(tmp_path / "m", {"pooling_mode": "mean"}, ["LSTM"])
    assert read_pooling(open_source(str(place))).words == "mean, dense, LSTM and what follows it left out"
    (place / "2_Dense" / "model.safetensors").unlink()
    assert read_pooling(open_source(str(place))).words == "mean, Dense and what follows it left out"
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode": "middle"}')
    with pytest.raises(FileError, match="pools by 'middle'"):
        read_pooling(open_source(str(place)))
