"""Models that cache in few bits by themselves: quantized, saved, loaded by both loaders, judged, generating."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.parts.test_kv_cache import caches, generated, model_of, same
from tests.tiny import given, input_ids, save_text, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache
from transformers.utils import logging

import nybble
from nybble.cli import main
from nybble.core.errors import FileError, GranularityError, ModelError, SchemeError, UsageError
from nybble.data import load_text, token_samples
from nybble.eval import evaluate
from nybble.eval._logits import PairPredictor
from nybble.kv_format import KVFormat
from nybble.nn.kv_cache import QuantizedCache
from nybble.nn.kv_model import cached_attentions, recorded_kv, use_quantized_cache
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.generate import generate
from nybble.pipelines.load import load
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.scheme import parse_scheme

LINE = "keys=(int4 group=4 symmetric=false) values=(nvfp4 group=8)"
KV = KVFormat.parse(LINE)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def run(*arguments: str) -> int:
    """Exit code of a command line in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.argv", ["nybble", *arguments])
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: ``float``; with int4 weights ``plain``, and the same that caches in few bits, ``kv``."""
    made = tmp_path_factory.mktemp("kv")
    save_tiny(made / "float", "gemma2", dtype=torch.float32)
    save_text(made / "text.txt", 300)
    common = ["--recipe", "rtn", "--weights", "int4 group=16", "--form", "native"]  # which both loaders read
    assert run("quantize", str(made / "float"), str(made / "plain"), *common) == 0
    assert run("quantize", str(made / "float"), str(made / "kv"), *common, "--kv", LINE) == 0
    return made


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def pretrained(folder: Path) -> Any:
    """By transformers alone; Gemma 2's attention as nybble asks for it, which transformers 5.17 would not."""
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager")


def fake(model: Any) -> Any:
    """The reference cache of a model."""
    return caches(model, KV)[1]


def test_the_file_records_it_and_changes_nothing_else(folder: Path) -> None:
    assert quantization(folder / "kv") == {**quantization(folder / "plain"), "kv": str(KV)}
    assert "kv" not in quantization(folder / "plain")
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        assert (folder / "kv" / name).read_bytes() == (folder / "plain" / name).read_bytes()
    manifest = json.loads((folder / "kv" / "nybble.json").read_text())
    assert manifest["recipe"]["scheme"]["kv"] == str(KV)


def test_both_loaders_generate_with_it(folder: Path, tmp_path: Path) -> None:
    """As the same weights do with rounded keys and values; also after another save, and in a copy."""
    plain, _ = load(folder / "plain")
    expected = generated(plain, fake(plain))
    assert not same(expected, generated(plain, None))
    ours, theirs = load(folder / "kv")[0], pretrained(folder / "kv")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert quantization(tmp_path / name)["kv"] == str(KV)
    models = (
        ours,
        theirs,
        load(tmp_path / "theirs")[0],
        pretrained(tmp_path / "ours"),
        copy.deepcopy(theirs),
    )
    for model in models:
        assert same(generated(model, None), expected)
        assert same(generated(model, None, num_beams=2), generated(plain, fake(plain), num_beams=2))


def test_a_line_of_everything_goes_through_a_file(folder: Path, tmp_path: Path) -> None:
    """Blocks of tokens, first and newest ones in float, rotated values, sorted keys: both loaders cache alike."""
    line = "keys=(int4 block=4x4) values=(int4 group=4) residual=2 sink=1 rotate=values sort=keys"
    common = ["--recipe", "rtn", "--weights", "int4 group=16", "--form", "native"]
    assert run("quantize", str(folder / "float"), str(tmp_path / "kv"), *common, "--kv", line) == 0
    written = quantization(tmp_path / "kv")["kv"]
    assert KVFormat.parse(written) == KVFormat.parse(line)
    models = (load(tmp_path / "kv")[0], pretrained(tmp_path / "kv"))
    found = [generated(model, None) for model in models]
    plain = load(folder / "plain")[0]
    assert not same(found[0], generated(plain, None))
    use_quantized_cache(plain, KVFormat.parse(line))
    assert same(found[0], found[1]) and same(found[0], generated(plain, None))
    unsorted = load(folder / "plain")[0]
    use_quantized_cache(unsorted, KVFormat.parse(line.removesuffix(" sort=keys")))
    assert not same(found[0], generated(unsorted, None))


def test_forwards_that_cache_do_it_in_few_bits(folder: Path) -> None:
    model: Any = load(folder / "kv")[0]
    plain: Any = load(folder / "plain")[0]
    with torch.no_grad():
        exact, rounded = plain(input_ids()).logits, plain(input_ids(), **given(plain, fake(plain))).logits
        assert not torch.equal(exact, rounded)
        for found in (model(input_ids()), model(input_ids(), use_cache=True), model(input_ids(), None, None, None)):
            assert torch.equal(found.logits, rounded) and isinstance(found.past_key_values, QuantizedCache)
        assert torch.equal(model.model(input_ids())[0], model.model(input_ids(), **given(model, fake(plain)))[0])
        assert torch.equal(model(input_ids(), use_cache=False).logits, exact)
        assert torch.equal(model(input_ids(), **given(model, DynamicCache(config=model.config))).logits, exact)
    assert same(generated(model, DynamicCache(config=model.config)), generated(plain, None))
    found = model.generate(input_ids(), max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True)
    assert isinstance(found.past_key_values, QuantizedCache)
    use_quantized_cache(model, None)
    assert recorded_kv(model) is None and same(generated(model, None), generated(plain, None))
    assert not any("cache" in name for name in vars(model))


def test_evaluation_sees_what_is_read_back(folder: Path) -> None:
    model, plain = load(folder / "kv")[0], load(folder / "plain")[0]
    tokens = input_ids()
    found = evaluate(model, tokens, ("nll",)).metrics["nll"]
    with torch.no_grad():
        logits = plain(tokens, **given(plain, fake(plain))).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found == pytest.approx(expected.item(), rel=1e-6)  # float32 against float64
    assert abs(found - evaluate(plain, tokens, ("nll",)).metrics["nll"]) > 1e-3


def test_the_command_judges_what_is_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of ``nybble eval`` is that of the float model's own forward over the reference cache."""
    text, plain = folder / "text.txt", load(folder / "plain")[0]
    ids = torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"])[:288].view(12, 24)

    def said(name: str) -> float:
        capsys.readouterr()
        assert run("eval", str(folder / name), "--data", str(text), "--seq-len", "24", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["data"]["samples"] == len(ids)
        return float(found["metrics"]["ppl"])

    def expected(**options: Any) -> float:
        with torch.no_grad():
            logits = plain(ids, **options).logits[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())

    cached, exact = expected(**given(plain, fake(plain))), expected(use_cache=False)
    assert said("kv") == pytest.approx(cached, rel=1e-6)  # float32 against float64
    assert said("plain") == pytest.approx(exact, rel=1e-6) and abs(cached / exact - 1) > 1e-4


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoders_and_decoders_are_judged_so(family: str) -> None:
    model = model_of(family)
    pairs = {"input_ids": input_ids(), "decoder_input_ids": input_ids()}
    with torch.no_grad():
        expected = model(**pairs, **given(model, fake(model))).logits.flatten(0, 1)
        exact = PairPredictor(model, pairs).predict(pairs)(0, 24)
        use_quantized_cache(model, KV)
        found = PairPredictor(model, pairs).predict(pairs)(0, 24)
    assert torch.equal(found, expected) and not torch.equal(found, exact)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoders_and_decoders(family: str) -> None:
    """The encoder's tokens are cached in few bits too."""
    model = model_of(family)
    names = cached_attentions(model)
    assert len(names) == (3 if family == "bart" else 2) and all("decoder." in name for name in names)
    assert not any("enc" in name.removeprefix("model.decoder").lower() for name in names)
    expected = generated(model, fake(model))
    use_quantized_cache(model, KV)
    assert same(generated(model, None), expected)
    with torch.no_grad():
        found = model(input_ids(), decoder_input_ids=input_ids())
    assert isinstance(found.past_key_values, EncoderDecoderCache)
    both = (found.past_key_values.self_attention_cache, found.past_key_values.cross_attention_cache)
    assert all(isinstance(cache, QuantizedCache) and cache.nbytes() for cache in both)


def test_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    """No weights: they stay float, the file says how to cache."""
    recipe = build_recipe("rtn", weights="none", kv=LINE)
    _, report = quantize(folder / "float", recipe, out=tmp_path / "kv")
    assert not report.layers and quantization(tmp_path / "kv") == {
        **quantization(folder / "plain"), "layouts": [], "modules": {}, "kv": str(KV)
    }  # fmt: skip
    exact, _ = load(folder / "float", dtype=torch.bfloat16)
    expected = generated(exact, fake(exact))
    assert same(generated(load(tmp_path / "kv")[0], None), expected)
    assert same(generated(pretrained(tmp_path / "kv"), None), expected)


def test_in_memory(folder: Path, tmp_path: Path) -> None:
    model: Any
    model, _ = quantize(tiny_model("llama", torch.float32), build_recipe("rtn", weights="none", kv=LINE))
    assert recorded_kv(model) == KV
    model.save_pretrained(tmp_path / "saved")
    auto: Any = AutoModelForCausalLM
    assert same(generated(auto.from_pretrained(tmp_path / "saved"), None), generated(model, None))
    nybble.save(model, tmp_path / "out", tiny_tokenizer())
    assert same(generated(load(tmp_path / "out")[0], None), generated(model, None))
    many = nybble.quantize_many(str(folder / "float"), {"a": build_recipe("rtn", weights="int4 group=16", kv=LINE)})
    assert recorded_kv(many["a"][0]) == KV


def test_rules_for_single_attentions(folder: Path, tmp_path: Path) -> None:
    """Layer 1 in float, layer 0 by its rule, in a file that both loaders read."""
    scheme = parse_scheme(
        {
            "rules": [
                {"targets": ["re:.*layers.1.self_attn"], "kv": "none"},
                {"targets": ["Attention"], "kv": "int8 token", "matmuls": "int8 token"},
                {"weights": "int4 group=16"},
            ],
            "kv": "int4 token",
        }
    )
    assert parse_scheme(scheme.to_dict()) == scheme
    recipe = build_recipe("rtn").with_scheme(scheme)
    quantize(folder / "float", recipe, out=tmp_path / "out")
    assert quantization(tmp_path / "out")["kv"] == {"model.layers.0.self_attn": "int8 token"}
    for model in (load(tmp_path / "out")[0], pretrained(tmp_path / "out")):
        with torch.no_grad():
            found = model(input_ids())
        assert set(found.past_key_values.qtensors()) == {"0.keys", "0.values"}
    rules = {"rules": [{"targets": ["re:.*layers.1.self_attn"], "kv": "none"}], "kv": "int4 token"}
    made, _ = quantize(tiny_model("llama"), build_recipe("rtn").with_scheme(parse_scheme(rules)))
    assert isinstance(made, nn.Module) and recorded_kv(made) == {
        "model.layers.0.self_attn": KVFormat.parse("int4 token")
    }


def test_eval_takes_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It judges a folder as one that records the line; ``none`` takes a recorded one away; the reference stays."""
    common = ["--data", str(folder / "text.txt"), "--seq-len", "32", "--samples", "3", "--metrics", "nll,kl", "--json"]

    def judged(name: str, *more: str) -> Any:
        assert run("eval", str(folder / name), "--reference", str(folder / "plain"), *common, *more) == 0
        return json.loads(capsys.readouterr().out)["metrics"]

    assert judged("plain", "--kv", LINE) == judged("kv") != judged("plain")
    assert judged("kv", "--kv", "none") == judged("plain") and judged("plain", "--kv", "none")["kl"] == 0
    assert run("eval", str(folder / "plain"), *common[:-3], "--kv", "int3 group=5") == 2
    assert "does not divide it" in capsys.readouterr().err
    assert run("eval", str(folder / "plain"), "--tasks", "any", "--kv", LINE) == 2
    assert "leave out --kv" in capsys.readouterr().err


def test_eval_in_memory_leaves_the_cache_as_it_was(folder: Path) -> None:
    model, _ = load(folder / "kv")
    before = recorded_kv(model)
    tokenizer = tiny_tokenizer()
    text = load_text(str(folder / "text.txt"), "evaluation", tokenizer)
    samples = token_samples(text, tokenizer, samples=2, seq_len=32)
    found = run_eval({"it": model}, samples, metrics=["nll"], kv="int4 token")
    assert before is not None and recorded_kv(model) == before and found["models"]["it"]["nll"] > 0
    with pytest.raises(UsageError, match="can't run in two ways"):
        run_eval({"it": model}, samples, reference=model, kv="int4 token")


def test_generate_takes_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--kv`` for any model; ``none`` is float where the file says otherwise."""

    def said(name: str, *more: str) -> str:
        capsys.readouterr()
        assert run("generate", str(folder / name), "ba be bi bo", "--max-new-tokens", "12", *more, "--json") == 0
        text: str = json.loads(capsys.readouterr().out)["text"]
        return text

    rough = "int2 token"
    assert said("kv") == said("plain", "--kv", LINE)
    assert said("kv", "--kv", "none") == said("plain")
    assert said("float", "--kv", rough) != said("float")
    assert said("kv", "--kv", rough) == said("plain", "--kv", rough)
    model: Any
    model, tokenizer = load(folder / "float")
    cache = QuantizedCache(model.config, keys=rough, values=rough)
    assert tokenizer is not None
    ids = tokenizer("ba be bi bo", return_tensors="pt")["input_ids"]
    options: Any = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **given(model, cache)}
    made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert said("float", "--kv", rough) == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_bad_requests(folder: Path, tmp_path: Path) -> None:
    float_model, out = str(folder / "float"), str(tmp_path / "out")
    assert run("quantize", float_model, out, "--recipe", "rtn", "--weights", "none", "--kv", "int4 group=32") == 2
    with pytest.raises(GranularityError, match=r"kv: int4 group=32: a row .* one head wide, 8 values.*Or 'token'"):
        quantize(float_model, build_recipe("rtn", weights="none", kv="int4 group=32"), out=out)
    with pytest.raises(SchemeError, match="nothing is left to quantize"):
        build_recipe("rtn", weights="none", kv="none")
    rules = {"rules": [{"targets": ["Linear"], "kv": "int4 token"}]}
    with pytest.raises(SchemeError, match="no matmuls of activations and no KV cache"):
        quantize(float_model, build_recipe("rtn").with_scheme(parse_scheme(rules)), out=out)
    with pytest.raises(SchemeError, match=r"kv: for attention modules; give them a rule of their own"):
        parse_scheme({"rules": [{"weights": "int4 token", "kv": "int4 token"}]})
    with pytest.raises(SchemeError, match="kv is a quantizer line"):
        parse_scheme({"kv": 4})
    with pytest.raises(UsageError, match="'tensor' has scales that tokens share"):
        generate(float_model, "ba", kv="int4")
    model: Any = load(folder / "kv")[0]
    for name in ("static", "offloaded", "quantized"):
        with pytest.raises(UsageError, match=f"cache_implementation='{name}': this model caches in few bits"):
            model.generate(input_ids(), max_new_tokens=2, cache_implementation=name)
    small = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    bert: Any = transformers.BertForMaskedLM(small)
    with pytest.raises(ModelError, match="BertForMaskedLM generates no text with a cache"):
        use_quantized_cache(bert, KV)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (4, "is no quantizer line: 4"),
        ({}, "is no quantizer line"),
        ("int4", "'tensor' has scales that tokens share"),
        ({"model.layers.9.self_attn": "int4 token"}, "model.layers.9.self_attn keeps no KV cache in this model"),
        ({"model.layers.0.mlp": "int4 token"}, "model.layers.0.mlp keeps no KV cache"),
        ("int4 group=32", "one head wide, 8 values"),
    ],
)
def test_files_that_say_something_else(folder: Path, tmp_path: Path, kv: Any, message: str) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (folder / "kv").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    config = json.loads((changed / "config.json").read_text())
    config["quantization_config"]["kv"] = kv
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises((FileError, ModelError), match=message):
        load(changed)


STATIC = "float8_e4m3fn tensor static"


@torch.no_grad()
def test_calibrated_scales(folder: Path, tmp_path: Path) -> None:
    """One a layer: the largest magnitude of what transformers caches of the data, over E4M3's; the same resumed."""
    ids = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    save_tiny(tmp_path / "float", "llama", dtype=torch.float32)
    auto: Any = AutoModelForCausalLM
    truth = auto.from_pretrained(tmp_path / "float")
    cached = truth(ids, use_cache=True).past_key_values.layers
    wanted = {f"model.layers.{i}.self_attn": [side.abs().amax() / 448 for side in (c.keys, c.values)] for i, c in
              enumerate(cached)}  # fmt: skip
    asked: dict[str, Any] = {"weights": "int8 channel", "kv": STATIC, "settings": {"dtype": torch.float32}}
    made, report = quantize(tmp_path / "float", "rtn", ids, **asked)
    found: Any = recorded_kv(made)
    assert found.keys() == wanted.keys()
    for name, kv in found.items():
        for side, scale in zip((kv.keys, kv.values), wanted[name], strict=True):
            torch.testing.assert_close(torch.tensor(side.scale.value), scale, rtol=1e-6, atol=0)
    rows = {row.name: row.input_scale for row in report.layers if row.name.endswith((".keys", ".values"))}
    assert rows == {f"{n}.{s}": getattr(kv, s).scale.value for n, kv in found.items() for s in ("keys", "values")}
    used = made.generate(ids[:, :4], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    for name, stored in used.past_key_values.qtensors().items():  # what is stored has that scale, and no other
        value = getattr(found[f"model.layers.{name.split('.')[0]}.self_attn"], name.split(".")[1]).scale.value
        assert set(stored.params.scale.flatten().tolist()) == {value} and stored.format.name == "float8_e4m3fn"
    for form in ("native", "auto"):
        out, _ = quantize(tmp_path / "float", "rtn", ids, out=tmp_path / form, form=form, **asked)
        assert recorded_kv(load(out)[0]) == found


def test_calibrated_scales_need_data_and_are_of_all_tokens(folder: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="the KV cache float8_e4m3fn static has no scales yet"):
        use_quantized_cache(model, KVFormat.parse(STATIC))
    for line in ("int8 token static", "float8_e4m3fn tensor static scale=mse", "nvfp4 static"):
        with pytest.raises(SchemeError, match=r"of a cache with calibrated scales there is '.* tensor static'"):
            KVFormat.parse(line)
    with pytest.raises(SchemeError, match="or 'int8 tensor static' for one scale a layer, calibrated"):
        KVFormat.parse("int8 tensor")
