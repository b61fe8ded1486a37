"""Encoders, vision transformers and encoder-decoders: their blocks replayed are the model, and quantizing works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import WORDS, save_text, tiny_tokenizer
from torch import Tensor, nn

import nybble
from nybble.calibration.trace import HIDDEN, capture_block_calls
from nybble.core.errors import DataError, UsageError
from nybble.data import load_text, make_source, sentence_samples
from nybble.data.sentences import split_sentences
from nybble.eval import embed, embedding_cosine
from nybble.models.adapter import adapter_for
from nybble.nn.attention import OperandWatch, attentions, use_quantized_attention
from nybble.nn.linear import QuantLinear
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.request import build_recipe
from nybble.recipe import parse_recipe
from nybble.walk.settings import Settings

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3, **{k: v for k, v in SIZES.items() if k != "vocab_size"}}
BART = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # class, model type, config
    "bert": ("BertModel", "bert", SIZES),
    "bert with a head": ("BertForMaskedLM", "bert", SIZES),
    "roberta": ("RobertaModel", "roberta", SIZES),
    "electra": ("ElectraModel", "electra", {**SIZES, "embedding_size": 32}),
    "vit": ("ViTForImageClassification", "vit", {k: v for k, v in IMAGE.items() if k != "max_position_embeddings"}),
    "deit": ("DeiTForImageClassification", "deit", {k: v for k, v in IMAGE.items() if k != "max_position_embeddings"}),
    "bart": ("BartForConditionalGeneration", "bart", BART),
    "mbart": ("MBartForConditionalGeneration", "mbart", BART),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "t5 gated": ("T5ForConditionalGeneration", "t5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "t5 encoder": ("T5EncoderModel", "t5", T5),
}
# Share of the output's power that rounding to eight bits may take: about 1.5 times what it does; four bits take 3 to 15
# times as much. Random T5s have no scaling of their attention scores, so they amplify.
LIMITS = {"t5": 0.035, "t5 gated": 0.15, "t5 encoder": 0.015}
TEXT = ("bert", "bert with a head", "roberta", "electra")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(name: str, seed: int = 3) -> Any:
    cls, kind, sizes = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, cls)._from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2 if name.startswith("t5") else 8)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(name: str, samples: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if name in ("vit", "deit"):
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 53, (samples, 10), generator=generator)
    mask = torch.ones_like(ids)
    if name in ("bart", "mbart", "t5", "t5 gated"):
        return {"input_ids": ids, "decoder_input_ids": torch.randint(3, 53, (samples, 7), generator=generator)}
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_replay_is_exact(name: str) -> None:
    """Blocks called one by one give what they give inside the model; the decoder's read the encoder's real output."""
    model, inputs = made(name), inputs_of(name)
    adapter = adapter_for(model)
    assert adapter.name == ("vit" if name == "deit" else MODELS[name][1] if name not in TEXT else "bert")
    expected: dict[str, Tensor] = {}

    def keep(block: str) -> Any:
        return lambda _, args, output: expected.update({block: output[0] if isinstance(output, tuple) else output})

    handles = [model.get_submodule(block).register_forward_hook(keep(block)) for block in adapter.block_names(model)]
    model(**inputs)
    for handle in handles:
        handle.remove()
    end: Tensor | None = None
    for names in adapter.stack_names(model):
        calls = capture_block_calls(model, inputs, end=end)
        given: Any = calls[0].start
        assert len(calls) == len(names)
        for block, call in zip(names, calls, strict=True):
            given = call.run(model.get_submodule(block), given)
            assert torch.equal(given[HIDDEN], expected[block])
        end = given[HIDDEN]
    assert len(adapter.stack_names(model)) == (2 if name in ("bart", "mbart", "t5", "t5 gated") else 1)
    assert (calls[0].mask is not None) == ("attention_mask" in inputs and end is not None and name != "x")


class Given:
    """Samples as a user could make them: inputs of any names, and where they come from."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        first = next(iter(inputs.values()))
        self.tokens, self.available, self.source = first.shape[0] * 10, first.shape[0], "random"

    def manifest(self) -> dict[str, Any]:
        return {"source": self.source, "samples": self.available}


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rtn", "gptq", "llm-fp4"])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_in_memory(name: str, recipe: str) -> None:
    """Every linear of the blocks, each within the bound that follows from eight bits; the model's output within LIMITS.

    An integer grid of +-127 steps rounds a row of n weights by at most max / 254 each, so the error's share of the
    power is below n / (4 * 127^2): 7e-4 for 48, where four bits lose 1e-2 and three 6e-2. A normal E4M3 value is off by
    2^-4 of itself at most, so the share is below 2^-8, where E2M1 loses 8e-3. Searching methods judge by outputs; there
    they may not lose more than round-to-nearest.
    """
    model, inputs = made(name), inputs_of(name, 6)
    exact = output_of(model, inputs)
    lines = {"rtn": "int8 channel", "gptq": "int8 channel", "llm-fp4": "float8_e4m3fn channel"}
    scheme = {"weights": lines[recipe], "inputs": "float8_e4m3fn tensor static"}
    options = {"grid": 8, "rounds": 1} if recipe == "llm-fp4" else {}
    made_recipe = parse_recipe({"name": recipe, "scheme": scheme, "steps": [{"solver": recipe, **options}]})
    settings = nybble.Settings(batch=4, dtype=torch.float32)
    found, report = nybble.quantize(model, made_recipe, Given(inputs), settings=settings)
    adapter = adapter_for(made(name))
    linears = {n for n, m in made(name).named_modules() if isinstance(m, nn.Linear) and adapter.inside(n)}
    assert {n for n, m in found.named_modules() if isinstance(m, QuantLinear) and adapter.inside(n)} == linears
    lost = float((output_of(found, inputs) - exact).square().mean() / exact.square().mean())
    assert 0 < lost < LIMITS.get(name, 5e-3)
    assert {row.name for row in report.layers} >= linears
    for row in report.layers:
        assert row.error is not None and row.rtn_error is not None
        bound = 2.0**-8 if recipe == "llm-fp4" else row.shape[-1] / (4 * 127**2)
        assert 0 < row.error <= min(bound, row.rtn_error), row


def output_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found


def test_sentences() -> None:
    text = "The first sentence is here. Is the second one? Too short. A third one follows\nhere, over lines.\n"
    assert split_sentences(text) == [
        "The first sentence is here.",
        "Is the second one?",
        "A third one follows",
    ]
    words = " ".join(WORDS[3:9])
    source = make_source([f"{words}\n{words} {words}\n" * 3], name="x", note="")
    samples = sentence_samples(source, padded(), samples=None, seq_len=9)
    assert samples.available == 2 and samples.tokens == 6 + 9
    assert samples.attention_mask.sum(1).tolist() == [6, 9]
    with pytest.raises(DataError, match=r"has 2 sentences .* fewer than the 5"):
        sentence_samples(source, padded(), samples=5, seq_len=9)
    with pytest.raises(DataError, match="no padding token"):
        sentence_samples(source, tiny_tokenizer(), samples=2, seq_len=9)


def padded() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    return tokenizer


def test_encoder_from_a_folder_to_its_cosine(tmp_path: Path) -> None:
    """``nybble quantize`` and ``eval`` on sentences; 8 bits stay close, 3 bits do not."""
    made("bert").save_pretrained(tmp_path / "float")
    padded().save_pretrained(tmp_path / "float")
    text = save_lines(tmp_path / "text.txt")
    found = {}
    for bits in (8, 3):
        recipe = build_recipe("minmax-int", weights=f"int{bits} channel", activations=f"int{bits} tensor static")
        out = tmp_path / f"out{bits}"
        settings = nybble.Settings(samples=16, seq_len=20, dtype=torch.float32)
        nybble.quantize(str(tmp_path / "float"), recipe, str(text), out=out, settings=settings)
        result = run_eval({"quantized": str(out)}, str(text), reference=str(tmp_path / "float"), seq_len=20, samples=16)
        found[bits] = result["models"]["quantized"]["cosine"]
    assert found[8] > 0.99 > found[3]
    with pytest.raises(UsageError, match="is judged by cosine"):
        run_eval({"q": str(out)}, str(text), metrics=["ppl"], reference=str(tmp_path / "float"), seq_len=20, samples=16)
    with pytest.raises(UsageError, match="give it as the reference"):
        run_eval({"q": str(out)}, str(text), seq_len=20, samples=16)


def save_lines(path: Path) -> Path:
    words = save_text(path).read_text().split()
    lengths = [5 + n % 9 for n in range(60)]
    lines, at = [], 0
    for length in lengths:
        lines.append(" ".join(words[at : at + length]))
        at += length
    path.write_text("\n".join(lines))
    return path


def test_padding_is_not_calibrated_on(tmp_path: Path) -> None:
    """More padding behind the same sentences changes no scale."""
    model = made("bert")
    source = load_text(str(save_lines(tmp_path / "text.txt")), "calibration")
    samples = sentence_samples(source, padded(), samples=8, seq_len=20)
    pad = torch.nn.functional.pad
    more = {"input_ids": pad(samples.input_ids, (0, 12)), "attention_mask": pad(samples.attention_mask, (0, 12))}
    scheme = {"weights": "int8 channel", "inputs": "int8 tensor static"}
    recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [{"solver": "rtn"}]})
    settings = nybble.Settings(dtype=torch.float32)
    _, ours = nybble.quantize(made("bert"), recipe, samples, settings=settings)
    _, theirs = nybble.quantize(model, recipe, Given(more), settings=settings)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.input_scale == pytest.approx(b.input_scale, rel=1e-4)


@torch.no_grad()
def test_a_pooler_with_static_inputs_is_taken_where_it_is_named() -> None:
    """Behind the blocks a class leaves it in float; its name, or a pattern, doesn't."""
    inputs, settings = inputs_of("bert"), nybble.Settings(dtype=torch.float32)
    first = made("bert")(**inputs).last_hidden_state[:, 0]  # what it reads
    for targets in (["Linear"], ["pooler.dense", "Linear"], ["re:.*pooler.*", "Linear"]):
        scheme = {"targets": targets, "weights": "int8 channel", "inputs": "int8 tensor static"}
        recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [{"solver": "rtn"}]})
        found, report = nybble.quantize(made("bert"), recipe, Given(inputs), settings=settings)
        scales = [row.input_scale for row in report.layers if row.name == "pooler.dense"]
        assert isinstance(found.get_submodule("pooler.dense"), QuantLinear) == bool(scales) == (len(targets) > 1)
        assert scales == [pytest.approx(float(first.abs().max()) / 127, rel=0.05)] * len(scales)


@torch.no_grad()
def test_operands_of_two_attentions_in_a_block_are_those_of_the_float_model() -> None:
    """A decoder's second attention reads what the first gives before its operands are rounded."""
    inputs, seen = inputs_of("bart"), dict[str, float]()
    exact = made("bart")
    use_quantized_attention(exact)
    for name, module in list(attentions(exact)):
        note: Any = lambda operand, x, name=name: seen.update({f"{name}.matmuls.{operand}": float(x.abs().max())})  # noqa: E731
        module.add_module("matmuls", OperandWatch(note))
    exact(**inputs)
    recipe = parse_recipe({"name": "x", "scheme": {"matmuls": "int2 tensor static"}, "steps": [{"solver": "rtn"}]})
    settings = nybble.Settings(dtype=torch.float32)
    _, report = nybble.quantize(made("bart"), recipe, Given(inputs), settings=settings)
    assert {row.name: row.input_scale for row in report.layers} == {
        n: pytest.approx(x, rel=1e-5) for n, x in seen.items()
    }
    assert len(seen) == 4 * (2 + 2 * 2)


def test_embeddings_leave_padding_out() -> None:
    model, inputs = made("bert"), inputs_of("bert")
    found = embed(model, inputs)
    hidden = model(**inputs).last_hidden_state
    assert torch.allclose(found[1], hidden[1, :6].mean(0), atol=1e-5)
    assert embedding_cosine(found, found) == {"cosine": pytest.approx(1.0), "cosine_min": pytest.approx(1.0)}


def test_bart_from_a_folder(tmp_path: Path) -> None:
    """Its logits have a stored bias that is a buffer outside of all blocks."""
    model = made("bart")
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.linspace(-1, 1, model.final_logits_bias.numel()).reshape(1, -1))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe, settings = build_recipe("rtn", weights="int8 channel"), Settings(dtype=torch.float32)
    nybble.quantize(tmp_path / "model", recipe, out=tmp_path / "out", settings=settings)
    loaded, _ = nybble.load(tmp_path / "out", dtype=torch.float32)
    inputs = inputs_of("bart")
    assert torch.equal(loaded.get_buffer("final_logits_bias"), model.final_logits_bias)
    with torch.no_grad():
        error = (loaded(**inputs).logits - model(**inputs).logits).abs().max()
    assert 0 < error < 0.1


LIKE_BART = {
    "marian": "MarianMTModel",
    "pegasus": "PegasusForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
}
FOLDERS = {**MODELS, **{name: (cls, name, BART) for name, cls in LIKE_BART.items()}}


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDERS)
def test_to_a_folder_and_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both loaders give what quantizing in memory gives.

    So does what is stored outside the blocks (``final_logits_bias``), or computed, never stored (Marian's positions).
    """
    monkeypatch.setitem(MODELS, name, FOLDERS[name])
    model: Any = made(name).bfloat16()
    stored = [b for n, b in model.named_buffers() if n in model.state_dict() and b.is_floating_point()]
    assert (name in ("bart", "mbart", "marian", "pegasus")) == bool(stored)
    for buffer in stored:
        buffer.add_(torch.linspace(-2, 2, buffer.numel()).view_as(buffer))
    model.save_pretrained(tmp_path / "float")
    recipe = build_recipe("rtn", weights="int8 channel")
    out, _ = nybble.quantize(tmp_path / "float", recipe, out=tmp_path / "out", form="native")
    memory: Any = nybble.quantize(type(model).from_pretrained(tmp_path / "float").eval(), recipe)[0]
    inputs = inputs_of("bart" if name in LIKE_BART else name)
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    expected = memory(**inputs)[0]
    theirs = type(model).from_pretrained(out).eval()
    theirs.save_pretrained(tmp_path / "again")
    for loaded in (nybble.load(out)[0], theirs, nybble.load(tmp_path / "again")[0]):
        assert torch.equal(loaded(**inputs)[0], expected)
