from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from tests.parts.report.synthetic import EVIL, learned, page_data
from tests.tiny import tiny_model

import nybble
from nybble.core.errors import UsageError
from nybble.formats import get_format
from nybble.quantizer import Quantizer
from nybble.report.checks import check_manifest
from nybble.report.learning import windows_of
from nybble.report.names import depth_of, kinds_of
from nybble.report.page import render
from nybble.report.tables import layer_facts, layer_table


class Reader(HTMLParser):
    """Tags with their attributes, and the text inside each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page.replace("<wbr>", ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1][0], data.strip()))

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    @property
    def text(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))

    @property
    def data(self) -> Any:
        return json.loads(next(text for tag, text in self.texts if tag == "script" and text.startswith("{")))


@pytest.fixture(scope="module")
def full() -> str:
    return render(page_data())


def test_page_is_small_and_stands_alone(full: str) -> None:
    assert len(full.encode()) < 1_500_000
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", full)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket", full)
    links = set(re.findall(r"https?://[^\s\"'<)]+", full))
    assert links == {"http://www.w3.org/2000/svg"}  # the namespace of SVG, never fetched


def test_page_shows_what_it_was_given(full: str) -> None:
    text = Reader(full).text
    for wanted in (
        *("SmolLM2-135M", "in smollm2-fp4 · LlamaForCausalLM · 30 blocks · 576 channels", "llm-fp4"),
        *("Formats and clips searched.", "float4_e2m1fn shifted static", "float4_e3m0 channel"),
        *("6.54", "4.03 in quantized layers", "110.0 MB", "210", "15.79", "14.12 before, in float"),
        *("KL divergence from the float model", "new_metric", "0.1234", "The sea is", "wide and green."),
        *("codes", "53,000,000", "48.18 %", "float4_e3m0", "model.layers.29.mlp.down_proj", "kept round-to-nearest"),
        *("settings.seed", "data.source_sha256", "ab12" * 16, "versions.torch", "2.13.0"),
    ):
        assert wanted in text, wanted


def test_change_of_a_metric() -> None:
    data = page_data(1)
    data["evaluation"]["models"] = {"quantized": {"ppl": 11.0, "kl": 0.5}, "float": {"ppl": 10.0, "kl": 0.0}}
    text = Reader(render(data)).text
    assert "+1.00 (+10.00 %)" in text
    assert "+0.500\n" in text  # no share of nothing
    assert text.index("Before (float)") < text.index("After (quantized)")


def test_a_page_is_headed_by_the_name_of_the_model() -> None:
    data = page_data(1)
    assert ("h1", "SmolLM2-135M") in Reader(render(data)).texts and "<title>SmolLM2-135M: nybble" in render(data)
    del data["manifest"]["name"]  # of an earlier version: the folder's
    page = Reader(render(data))
    assert ("h1", "smollm2-fp4") in page.texts and "in smollm2-fp4" not in page.text


def test_the_scheme_is_at_the_top_line_by_line() -> None:
    data = page_data(1)
    rules = [
        {"targets": ["re:.*down_proj"], "weights": str(Quantizer("nvfp4"))},
        {"targets": ["Attention"], "matmuls": "int8 token"},
    ]
    data["manifest"]["recipe"]["scheme"] = {"rules": rules, "kv": "int4 group=32"}
    tags = Reader(render(data)).texts
    start = tags.index(("dt", "Weights"))
    assert [text for _, text in tags[start : start + 9]] == [
        *("Weights", "float4_e2m1fn group=16 scale_format=(float8_e4m3fn floor=normal)", "nvfp4 of re:.*down_proj"),
        *("Attention's products", "int8 token", "of Attention", "KV cache", "int4 group=32"),
        "bits a weight, everything stored",
    ]


@pytest.mark.parametrize("scheme", [None, "W4A16", [], {"rules": 5}, {"rules": [5, {"weights": 5, "targets": 5}]}])
def test_a_scheme_that_says_nothing(scheme: object) -> None:
    data = page_data(1)
    data["manifest"]["recipe"]["scheme"] = scheme
    text = Reader(render(data)).text
    assert "Chosen formats" not in text and "Formats" in text


def test_formats_are_chosen_only_where_the_scheme_asked_for_others() -> None:
    data = page_data(2)
    text = Reader(render(data)).text
    assert "Chosen formats" in text and "Weights: layers of each kind" in text
    assert "Inputs of all 14 layers:\nfloat4_e2m1fn shifted static" in text  # one: no table
    for row in data["manifest"]["layers"]:
        row["weights"] = "int4 group=64 symmetric=false"
    data["manifest"]["recipe"]["scheme"] = {"rules": [{"weights": "int4 group=64 symmetric=false"}]}
    for row in data["manifest"]["layers"]:
        row["inputs"] = None
    text = Reader(render(data)).text
    assert "Chosen" not in text and "Weights of all 14 layers:\nint4 group=64 symmetric=false" in text
    assert "Inputs of all 14 layers:\nfloat\n" in text


def test_drawing_data_has_the_grids_of_the_formats(full: str) -> None:
    data = Reader(full).data
    assert set(data["grids"]) == {"float4_e2m1fn", "float4_e3m0"}
    assert data["grids"]["float4_e2m1fn"] == list(get_format("float4_e2m1fn").grid)
    assert len(data["layers"]) == 210
    assert len(data["layers"][0]["weight_picture"]["counts"]) == 64


def test_no_evaluation_says_how_to_get_one() -> None:
    data = page_data(1)
    data["evaluation"] = None
    text = Reader(render(data)).text
    assert "nybble quantize … --eval SRC" in text
    assert "dB median SQNR" in text


def test_layers_without_calibration_and_pictures() -> None:
    data = page_data(1)
    for row in data["manifest"]["layers"]:
        row.update(clip=None, input_shifts=None, weight_picture=None, input_picture=None, inputs=None, sqnr=None)
        row.update(error=None, rtn_error=None, notes=[])
    text = Reader(render(data)).text
    assert "Columns without any value are left out: SQNR dB, Error, RTN error, Ratio, Clip low" in text
    assert "How the inputs' channels differ" not in text


@pytest.mark.parametrize(
    "place", ["title", "name", "recipe", "prompt", "sample", "metric", "note", "model", "line", "scheme", "window"]
)
def test_texts_of_others_are_escaped(place: str) -> None:
    data = page_data(1)
    manifest, evaluation, row = data["manifest"], data["evaluation"], data["manifest"]["layers"][0]
    if place == "title":
        data["title"] = EVIL
    elif place == "name":
        row["name"] = EVIL
    elif place == "recipe":
        manifest["recipe"].update(name=EVIL, summary=EVIL, source=EVIL, scheme={"name": EVIL})
    elif place == "prompt":
        evaluation["samples"][0]["prompt"] = EVIL
    elif place == "sample":
        evaluation["samples"][0][EVIL] = EVIL
    elif place == "metric":
        evaluation["models"]["quantized"][EVIL] = EVIL
    elif place == "note":
        row["notes"] = [EVIL]
    elif place == "window":
        row["learned"] = learned(0)
        row["learned"]["windows"][0] |= {"window": EVIL, "loss": EVIL, "kept": EVIL, "precision": EVIL}
    elif place == "model":
        manifest.update(name=EVIL, model={EVIL: EVIL})
    elif place == "scheme":
        manifest["recipe"]["scheme"] = {"rules": [{"targets": [EVIL], "weights": EVIL}] * 2}
    else:
        row["weights"] = EVIL
    plain, page = Reader(render(page_data(1))), render(data)
    read = Reader(page)
    assert "<script>alert" not in page
    assert (read.count("script"), read.count("img")) == (plain.count("script"), 0)
    shown = "".join(text for _, text in read.texts) + str([attributes for _, attributes in read.tags]) + str(read.data)
    assert "alert(1)" in shown  # it is there, as text


def test_a_sound_is_played_beside_what_was_understood() -> None:
    data = page_data(1)
    sound = "data:audio/wav;base64,UklGRg=="
    data["evaluation"]["samples"] = [{"prompt": "one two", "audio": sound, "float": "one too", "quantized": "won two"}]
    page = render(data)
    assert f'<audio controls preload="none" src="{sound}"></audio>' in page and page.count(sound) == 1
    assert "media-src data:" in page and "Understood speech" in page
    assert all(text in page for text in ("one two", "one too", "won two")) and "<h4>audio" not in page


def test_script_is_the_one_that_the_policy_allows(full: str) -> None:
    import base64
    import hashlib

    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", full)
    script = full[full.rindex("<script>") + len("<script>") : full.rindex("</script>")]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed


def test_half_a_surrogate_pair_can_be_written() -> None:
    assert "a?b" in render(page_data(1, title="a\ud800b"))


def test_missing_jinja_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install 'nybble\[report\]'"):
        render(page_data(1))


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("model.layers.12.self_attn.q_proj", "q_proj", 12),
        ("transformer.h.0.mlp.c_fc", "c_fc", 0),
        ("model.layers.3.mlp.experts.gate_up_proj.experts.7", "gate_up_proj", 3),
        ("model.layers.3.mlp.experts.7.w1", "w1", 3),
        ("encoder.layer.0.attention.self.matmuls.query", "query in matmul", 0),
        ("lm_head", "lm_head", None),
        ("7", "7", 7),
        ("a..b", "b", None),
    ],
)
def test_kind_and_depth(name: str, kind: str, depth: int | None) -> None:
    assert (kinds_of([name]), depth_of(name)) == ({name: kind}, depth)


FAMILIES = {
    "BertForMaskedLM": "attention.output.dense decoder intermediate.dense key layer.output.dense query transform.dense "
    "value",
    "GPT2LMHeadModel": "attn.c_proj c_attn c_fc lm_head mlp.c_proj",
    "LlamaForCausalLM": "down_proj gate_proj k_proj lm_head o_proj q_proj up_proj v_proj",
    "BartModel": " ".join(
        f"{part}.{end}"
        for part in ("decoder.self_attn", "encoder.self_attn", "encoder_attn")
        for end in ("k_proj", "out_proj", "q_proj", "v_proj")
    )
    + " decoder.fc1 decoder.fc2 encoder.fc1 encoder.fc2",
    "ResNetForImageClassification": "classifier embedder.convolution layer.convolution shortcut.convolution",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_kinds_of_layers_share_a_name(family: str) -> None:
    import transformers
    from torch import device, nn

    with device("meta"):
        cls: Any = getattr(transformers, family)
        model = cls(cls.config_class())
    layers = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    kinds = kinds_of(name for name, module in model.named_modules() if isinstance(module, layers))
    assert sorted(set(kinds.values())) == sorted(FAMILIES[family].split())
    assert len({re.sub(r"\.\d+", "", name) for name in kinds}) == len(set(kinds.values()))


def test_numbers_of_the_table() -> None:
    row = page_data(1)["manifest"]["layers"][0] | {"error": 0.02, "rtn_error": 0.08, "sqnr": 17.456, "bits": 4.5}
    columns, (cells,) = layer_table(layer_facts([row]))
    found = {column[0]: cell for column, cell in zip(columns, cells, strict=True)}
    assert found["ratio"][:2] == ("0.250", 0.25)
    assert found["error"][:2] == ("2.00 %", 0.02)
    assert found["sqnr"][0] == "17.46"
    assert found["shape"][:2] == ("576 × 576", 576 * 576)
    assert found["shifted"][0] == "10.4 %"  # 60 of 576
    assert [column[3] for column in columns if column[0] in ("name", "bits", "weights")] == [False, False, True]


def test_what_was_learned_is_drawn() -> None:
    """A row and a curve for each window, columns for each layer; nothing where nothing was learned."""
    data = page_data()
    assert "What was learned" not in render(data)
    for index in (0, 7):
        data["manifest"]["layers"][index]["learned"] = learned(index)
    short = learned(1)
    del short["windows"][0]["curve"]  # of a layer that the window doesn't begin with
    data["manifest"]["layers"][1]["learned"] = short
    page = Reader(render(data))
    assert {"What was learned", "block 0 (2 blocks)", "block 7 (2 blocks)", "-75 %", "step 173", "bfloat16"} <= set(
        page.text.split("\n")
    )
    assert page.text.count("block 1 ") == 0
    paths = [
        attributes["d"] for tag, attributes in page.tags if tag == "path" and "M0.0 0.0 L" in str(attributes.get("d"))
    ]
    assert len(paths) == 2 and str(paths[0]).count("L") == 19
    columns, rows = layer_table(layer_facts(data["manifest"]["layers"]))
    keys = [column[0] for column in columns]
    assert rows[0][keys.index("moved")] == ("7.12 %", 0.0712) and rows[2][keys.index("moved")][1] is None
    assert [rows[7][keys.index(key)][0] for key in ("scale_low", "scale_mid", "scale_high")] == [
        "0.810",
        "0.990",
        "1.000",
    ]


def test_windows_of_a_real_run() -> None:
    recipe = {
        "scheme": {"weights": "int3 group=16 symmetric=false"},
        "steps": [{"reconstruction": "mse", "weights": "flexround", "window": 2, "steps": 6}],
    }
    _, report = nybble.quantize(tiny_model(), recipe, torch.arange(48).reshape(2, 24))
    rows = [row.to_dict() for row in report.layers]
    check_manifest({"recipe": {}, "layers": rows}, "nybble.json")
    found = windows_of(rows)
    assert len(found) == 1 and found[0]["path"].startswith("M0.0") and found[0]["steps"] == "6"
