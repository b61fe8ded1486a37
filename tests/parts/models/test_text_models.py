"""Models of text by class, as they come from a folder: encoder-decoders, encoders with heads, wrappers with towers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import save_text, tiny_tokenizer

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.trace import HIDDEN, capture_block_calls
from nybble.core.errors import DataError, ModelError
from nybble.data import load_text, pair_samples
from nybble.models.adapter import adapter_for, reads_of
from nybble.models.sources.open import open_source
from nybble.pipelines.evaluate import judge_folder
from nybble.pipelines.request import build_recipe
from nybble.walk.settings import Settings

# Older transformers script functions of DeBERTa when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
DISTIL = {"vocab_size": 300, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
SWITCH = {**T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
          "num_experts": 2}  # fmt: skip
LLAVA = {
    "text_config": {"model_type": "llama", **SIZES},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    },
    "image_token_index": 299,
}  # fmt: skip


def made(name: str, kind: str, sizes: dict[str, Any], factor: float = 4) -> Any:
    torch.manual_seed(3)
    cls: Any = getattr(transformers, name)
    model = cls._from_config(transformers.AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.ndim > 1 else 1)
    return model


def saved(folder: Path, model: Any) -> tuple[str, str]:
    """The model's folder, and a file of lines of nine words."""
    model.save_pretrained(folder / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder / "m")
    words = save_text(folder / "text.txt", 600).read_text().split()
    (folder / "text.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, 600, 9)))
    return str(folder / "m"), str(folder / "text.txt")


@pytest.mark.parametrize(
    ("name", "kind", "sizes", "reads"),
    [
        ("T5ForConditionalGeneration", "t5", T5, "pairs"), ("T5Model", "t5", T5, "pairs"),
        ("T5EncoderModel", "t5", T5, "sentences"), ("T5ForTokenClassification", "t5", T5, "sentences"),
        ("UMT5ForConditionalGeneration", "umt5", T5, "pairs"), ("LEDModel", "led", BART, "pairs"),
        ("BartForSequenceClassification", "bart", BART, "sentences"), ("BartForCausalLM", "bart", BART, "tokens"),
        ("BertForMaskedLM", "bert", SIZES, "sentences"), ("BertLMHeadModel", "bert", SIZES, "tokens"),
        ("DistilBertForTokenClassification", "distilbert", DISTIL, "sentences"),
        ("LlamaForSequenceClassification", "llama", SIZES, "sentences"), ("LlamaForCausalLM", "llama", SIZES, "tokens"),
        ("FalconForCausalLM", "falcon", SIZES, "tokens"), ("SwinModel", "swin", {}, "images"),
        ("LlavaForConditionalGeneration", "llava", LLAVA, "tokens"),
    ],
)  # fmt: skip
def test_the_class_says_what_a_model_reads(name: str, kind: str, sizes: dict[str, Any], reads: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **sizes))
    assert reads_of(model) == reads
    if kind != "swin":
        assert adapter_for(model).reads == reads


SEQ2SEQ = {
    "t5": ("T5ForConditionalGeneration", "t5", T5), "bart": ("BartForConditionalGeneration", "bart", BART),
    "switch": ("SwitchTransformersForConditionalGeneration", "switch_transformers", SWITCH),
    "longt5": ("LongT5ForConditionalGeneration", "longt5", {**T5, "local_radius": 4}),
    "umt5": ("UMT5ForConditionalGeneration", "umt5", T5),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders_from_a_folder_with_calibration(tmp_path: Path, name: str) -> None:
    """Both stacks are walked on inputs and targets; the judge's perplexity is that of transformers' own loss."""
    place, text = saved(tmp_path, made(*SEQ2SEQ[name], factor=2))
    out, report = nybble.quantize(place, "gptq", text, out=tmp_path / "q", settings=Settings(samples=8, seq_len=10))
    assert isinstance(out, Path)
    assert report.manifest["data"]["targets"] == "how the text goes on"
    names = {row.name.split(".block")[0].split(".layers")[0].removeprefix("model.") for row in report.layers}
    assert {"encoder", "decoder"} <= names
    assert not any("never" in note for row in report.layers for note in row.notes)
    found = judge_folder(out, place, text, seq_len=10, device="cpu")
    model = open_source(place).model(torch.bfloat16)
    tokenizer = nybble.load(out)[1]
    assert tokenizer is not None
    samples = pair_samples(load_text(text, "evaluation"), tokenizer, samples=None, seq_len=10)
    with torch.no_grad():
        logits = model(input_ids=samples.input_ids, labels=samples.labels).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples.labels.flatten())
    assert found["models"]["float"]["ppl"] == pytest.approx(math.exp(float(loss)), rel=0.02)
    assert found["data"]["predictions"] == samples.labels.numel()
    assert 0 < found["models"]["quantized"]["kl"] < 3
    assert {"prompt", "float", "quantized"} <= set(found["samples"][0])


def test_tables_outside_the_blocks_that_are_tied_to_a_blocks_own(tmp_path: Path) -> None:
    """UDOP's position biases are one with its first block's, which are released before the rest is written."""
    sizes = {**T5, "num_decoder_layers": 2, "image_size": 16, "patch_size": 8, "d_ff": 64}
    model = made("UdopForConditionalGeneration", "udop", sizes, factor=1)
    model.save_pretrained(tmp_path / "m")
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 299, (2, 8), generator=generator)
    inputs = {"input_ids": ids, "bbox": torch.rand(2, 8, 4, generator=generator), "decoder_input_ids": ids[:, :5]}
    settings = Settings(dtype=torch.float32)
    nybble.quantize(
        str(tmp_path / "m"), "gptq", [inputs], weights="int8 channel", out=tmp_path / "q", settings=settings
    )
    back = nybble.load(tmp_path / "q")[0]
    with torch.no_grad():
        want, got = model(**inputs).logits, back(**inputs).logits
    assert 0 < float((got - want).norm() / want.norm()) < 0.01
    tables = [m.weight for n, m in back.named_modules() if n.endswith("relative_attention_bias")]
    assert len(tables) > 2 and len({table.data_ptr() for table in tables}) < len(tables)


def test_bare_encoder_decoders_are_judged_by_their_hidden_states(tmp_path: Path) -> None:
    place, text = saved(tmp_path, made("BartModel", "bart", BART))
    out, _ = nybble.quantize(place, "rtn", text, out=tmp_path / "q", settings=Settings(samples=8, seq_len=10))
    found = judge_folder(Path(str(out)), place, text, seq_len=10, device="cpu")["models"]
    assert found["float"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert 0.9 < found["quantized"]["cosine"] < 1 - 1e-5


def test_a_generic_encoder_decoder_has_two_stacks() -> None:
    adapter = adapter_for(made("UMT5ForConditionalGeneration", "umt5", T5))
    assert (adapter.name, adapter.blocks, adapter.decoder_blocks) == ("generic", "encoder.block", "decoder.block")


@pytest.mark.parametrize("name", ["XLMRobertaForMaskedLM", "CamembertForMaskedLM"])
def test_heads_before_the_encoder_are_loaded(tmp_path: Path, name: str) -> None:
    """Of a tied table the stored name is the one that transformers ties the others to; any name of it can be read."""
    kind = "camembert" if name.startswith("C") else "xlm-roberta"
    place, text = saved(tmp_path, made(name, kind, SIZES))
    settings = Settings(samples=8, seq_len=12)
    out, _ = nybble.quantize(place, "rtn", text, out=tmp_path / "q", settings=settings, form="native")
    weights = Path(str(out)) / "model.safetensors"
    table = "roberta.embeddings.word_embeddings.weight"
    tensors = load_file(weights)
    assert table in tensors
    assert "lm_head.decoder.weight" not in tensors
    ids = torch.arange(3, 23).reshape(2, 10)
    model, _ = nybble.load(str(out))
    with torch.no_grad():
        wanted = model(ids).logits
        cls: Any = getattr(transformers, name)
        assert torch.equal(cls.from_pretrained(out)(ids).logits, wanted)
        save_file(
            {**{k: t for k, t in tensors.items() if k != table}, "lm_head.decoder.weight": tensors[table]}, weights
        )
        assert torch.equal(nybble.load(str(out))[0](ids).logits, wanted)
    assert judge_folder(Path(str(out)), place, text, seq_len=10, device="cpu")["models"]["quantized"]["agreement"] > 0.3


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [("DistilBertForMaskedLM", "distilbert", DISTIL), ("LlamaForSequenceClassification", "llama", SIZES),
     ("DebertaV2ForTokenClassification", "deberta-v2", SIZES)],
)  # fmt: skip
def test_encoders_with_heads_are_calibrated_and_judged(tmp_path: Path, name: str, kind: str, sizes: Any) -> None:
    place, text = saved(tmp_path, made(name, kind, sizes))
    out, _ = nybble.quantize(place, "gptq", text, out=tmp_path / "q", settings=Settings(samples=8, seq_len=10))
    found = judge_folder(Path(str(out)), place, text, seq_len=10, device="cpu")["models"]
    assert found["float"] == pytest.approx({"cosine": 1, "cosine_min": 1, "kl": 0, "agreement": 1}, abs=1e-6)
    assert found["quantized"]["kl"] > 0
    assert 0.9 < found["quantized"]["cosine"] < 1


@torch.no_grad()
def test_blocks_that_return_two_things_are_replayed() -> None:
    model = made("DebertaForMaskedLM", "deberta", SIZES)
    inputs = {"input_ids": torch.arange(3, 23).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    calls = capture_block_calls(model, inputs)
    given: Any = calls[0].start
    for call, block in zip(calls, model.deberta.encoder.layer, strict=True):
        given = call.run(block, given)
    assert torch.equal(given[HIDDEN], model.deberta(**inputs).last_hidden_state)


def test_what_blocks_hand_on_without_an_adapter_is_refused() -> None:
    model = made("PegasusXForConditionalGeneration", "pegasus_x", {**BART, "block_size": 4, "num_global_tokens": 2})
    ids = torch.arange(3, 23).reshape(2, 10)
    with pytest.raises(ModelError, match="hand on more than hidden states, and no adapter says what"):
        capture_block_calls(model, {"input_ids": ids, "decoder_input_ids": ids})


def test_a_deep_vision_tower_is_not_taken_for_the_language_model(tmp_path: Path) -> None:
    model = made("LlavaForConditionalGeneration", "llava", LLAVA)
    assert adapter_for(model).blocks == "model.language_model.layers"
    place, text = saved(tmp_path, model)
    recipe = build_recipe("gptq", ignore=["re:.*vision_tower.*", "re:.*multi_modal_projector.*"])
    out, report = nybble.quantize(place, recipe, text, out=tmp_path / "q", settings=Settings(samples=8, seq_len=10))
    assert len(report.layers) == 2 * 7
    found = judge_folder(Path(str(out)), place, text, seq_len=10, device="cpu")["models"]["quantized"]
    assert 0 < found["kl"] < 0.5


def test_a_cast_is_no_write_to_a_block() -> None:
    block: Any = torch.nn.ModuleDict({"gate": torch.nn.Linear(4, 4, bias=False).bfloat16()})
    truth = torch.randn(4, 4)
    block.gate.weight.data = truth.bfloat16()
    state = BlockState(block, "b", {"gate.weight": truth})
    block.gate.float()
    assert torch.equal(state.get("gate.weight"), truth)
    block.gate.weight.data = block.gate.weight.data + 1
    with pytest.raises(RuntimeError, match="written to without"):
        state.get("gate.weight")


def test_models_of_sound_are_rounded_without_a_tokenizer(tmp_path: Path) -> None:
    """Their BatchNorms would be folded on inputs that nobody has; what needs data says which."""
    sizes = {
        **{k: v for k, v in SIZES.items() if "key_value" not in k}, "conv_dim": (8, 8), "conv_stride": (2, 2),
        "conv_kernel": (3, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
        "conv_depthwise_kernel_size": 3, "position_embeddings_type": "relative",
    }  # fmt: skip
    model = made("Wav2Vec2ConformerModel", "wav2vec2-conformer", sizes, factor=1)
    model.save_pretrained(tmp_path / "m")
    said: list[str] = []
    nybble.quantize(str(tmp_path / "m"), weights="int8 channel", out=tmp_path / "q", announce=said.append)
    assert any("left out, as no data is given: transform 'fold-batchnorm'" in line for line in said)
    with pytest.raises(DataError, match=r"reads input_values, and 'builtin' is text; give a folder of WAV files "):
        nybble.quantize(str(tmp_path / "m"), "gptq", weights="int8 channel")
    sound = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}
    back, settings = nybble.load(tmp_path / "q", dtype="float32")[0], Settings(dtype=torch.float32)
    with torch.no_grad():
        want, got = model(**sound).last_hidden_state, back(**sound).last_hidden_state
    assert 0 < float((want - got).norm() / want.norm()) < 0.05
    found, _ = nybble.quantize(str(tmp_path / "m"), "gptq", sound, weights="int8 channel", settings=settings)
    with torch.no_grad():
        assert float((found(**sound).last_hidden_state - want).norm() / want.norm()) < 0.05
