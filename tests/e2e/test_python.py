"""What stands behind ``import nybble``, as its first user meets it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import logits, save_tiny, tiny_model, tiny_tokenizer
from torch import nn

import nybble
from nybble.core.errors import DeviceError, NybbleError, SchemeError, UsageError
from nybble.nn.kinds import quant_modules
from nybble.scheme import Scheme, parse_scheme
from nybble.solvers.rtn import Rtn
from nybble.training.convert import convert
from nybble.training.prepare import prepare

LINE = "int4 group=16 scale_format=float16"
untyped: Any = nybble
TRACED = torch.jit.ScriptModule()


def rounded(line: str = LINE) -> torch.Tensor:
    """What the tiny model says with every layer inside its blocks rounded, by hand."""
    model, quantizer = tiny_model(), nybble.Quantizer(line)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("model.layers."):
                module.weight.copy_(quantizer.fake_quantize(module.weight))
    return logits(model)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("rtn", {"weights": LINE}),
        ("rtn", {"weights": nybble.Quantizer(LINE), "activations": "none"}),
        ("rtn", {"scheme": {"weights": LINE}}),
        ("rtn", {"scheme": parse_scheme({"weights": LINE})}),
        (parse_scheme({"weights": LINE}), {}),
        ({"scheme": {"weights": LINE}, "steps": [{"solver": "rtn"}]}, {}),
    ],
)
def test_every_way_to_say_the_same(recipe: Any, changes: Any) -> None:
    model, report = nybble.quantize(tiny_model(), recipe, **changes)
    assert torch.equal(logits(model), rounded())
    assert len(report.layers) == 14 and {round(row.bits, 3) for row in report.layers} == {5.0}


def test_a_recipe_may_be_left_out() -> None:
    assert torch.equal(logits(nybble.quantize(tiny_model(), weights=LINE)[0]), rounded())


def test_ignored_modules_stay(tmp_path: Path) -> None:
    model, report = nybble.quantize(tiny_model(), weights=LINE, ignore=["re:.*mlp.*"])
    assert len(report.layers) == 8
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear


@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 8), lambda: nn.Conv2d(2, 8, 4)])
def test_a_model_that_is_one_layer(make: Callable[[], nn.Module]) -> None:
    """It can't be replaced in place; what is returned is the quantized one."""
    wanted = make()
    state = {name: tensor.clone() for name, tensor in wanted.state_dict().items()}
    weight: Any = wanted.weight
    x = torch.randn(3, 32) if weight.dim() == 2 else torch.randn(3, 2, 6, 6)
    weight.data = nybble.Quantizer(LINE).fake_quantize(weight.flatten(1)).view(weight.shape)

    def again() -> nn.Module:
        layer = make()
        layer.load_state_dict(state)
        return layer

    quantized, report = nybble.quantize(again(), weights=LINE)
    trained = convert(prepare(again(), {"targets": [type(wanted).__name__], "weights": LINE}))
    for found in (quantized, trained):
        assert [name for name, _ in quant_modules(found)] == [""] and torch.equal(found(x), wanted(x))
    assert len(report.layers) == 1


def test_settings_are_a_mapping() -> None:
    with pytest.raises(SchemeError, match=r"no option 'seqlen'. Did you mean 'seq_len'"):
        nybble.quantize(tiny_model(), weights=LINE, settings={"seqlen": 4})
    with pytest.raises(UsageError, match=r"settings are a nybble.Settings"):
        nybble.quantize(tiny_model(), weights=LINE, settings=[4])  # type: ignore[arg-type]
    assert nybble.quantize(tiny_model(), weights=LINE, settings={"seed": 4})[1].manifest["settings"]["seed"] == 4


@pytest.mark.parametrize(
    ("field", "wrong", "said"),
    [
        ("dtype", "fp16", "dtype is 'fp16'; give float32, bfloat16 or float16, as a name or torch's"),
        ("dtype", torch.int8, r"dtype is torch\.int8; give float32"),
        ("dtype", 16, "dtype is 16; give float32"),
        ("products", "int8", "products is 'int8'; give float32"),
        ("device", "gpu", "device 'gpu' is neither cpu nor cuda"),
        ("device", "cuda:one", "device 'cuda:one' is neither cpu nor cuda"),
        ("device", 0, "device '0' is neither cpu nor cuda"),
        ("device", torch.device("meta"), "device 'meta' is neither cpu nor cuda"),
        ("samples", "4", "settings: samples is an int; got '4'"),
        ("seq_len", 2.5, r"settings: seq_len is an int; got 2\.5"),
        ("batch", 0, "batch is 0; it must be 1 or more"),
        ("seed", "a", "settings: seed is an int; got 'a'"),
        ("resume", "no", "settings: resume is a bool; got 'no'"),
        ("spill", 1, "settings: spill is a bool; got 1"),
    ],
)
def test_a_setting_that_is_none(field: str, wrong: Any, said: str) -> None:
    """However it is given; ``Settings(samples="4")`` was a TypeError, ``resume="no"`` a yes."""
    with pytest.raises(UsageError, match=said):
        nybble.Settings.of({field: wrong})
    with pytest.raises(UsageError, match=said):
        nybble.Settings(**{field: wrong})


def test_dtypes_and_devices_by_name(tmp_path: Path) -> None:
    model, report = nybble.quantize(str(save_tiny(tmp_path, "llama")), weights=LINE, settings={"dtype": "float16"})
    assert model.dtype == torch.float16 and report.manifest["settings"]["dtype"] == "torch.float16"
    assert nybble.Settings(dtype="bfloat16", device=torch.device("cpu")) == nybble.Settings(
        dtype=torch.bfloat16, device="cpu"
    )
    assert nybble.load(tmp_path, dtype="float16")[0].dtype == torch.float16
    with pytest.raises(UsageError, match=r"dtype is 'half'; give float32"):
        nybble.load(tmp_path, dtype="half")
    with pytest.raises(UsageError, match=r"device 'gpu' is neither cpu nor cuda"):
        nybble.load(tmp_path, device="gpu")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((5,), "a model is a hub id, a path, or a torch module"),
        ((nn.Linear(2, 2), 5), "a recipe is a name"),
        ((nn.Linear(2, 2), torch.zeros(1)), "Data is the next argument"),
    ],
)
def test_what_is_neither_model_nor_recipe(arguments: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        nybble.quantize(*arguments)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: untyped.quantize(nn.Linear(2, 2), weight="int4"), "no argument 'weight'. Did you mean 'weights'"),
        (lambda: untyped.quantize(nn.Linear(2, 2), samples=2), r"one of the settings: settings=\{'samples'"),
        (lambda: untyped.preflight(nn.Linear(2, 2), bits=4), "no argument 'bits'. Known: activations"),
        (
            lambda: untyped.quantize(nn.Linear(2, 2), weights="4bit"),
            "Did you mean 'int4' or 'int4_full' or 'float4_e2m",
        ),
        (lambda: untyped.quantize_many("folder", ["rtn"]), "recipes are a mapping of any names to recipes; got a list"),
        (lambda: untyped.quantize(nn.Sequential(nn.ReLU()), weights="int4"), "a Sequential without weights"),
        (lambda: untyped.quantize(nn.Linear(2, 2, device="meta"), weights="int4"), "Linear are on the meta device"),
        (lambda: untyped.quantize(TRACED, weights="int4"), "a TorchScript module can't be given other layers"),
        (lambda: untyped.preflight(TRACED, weights="int4"), "a TorchScript module can't be given other layers"),
        (lambda: untyped.quantize(nn.Linear(2, 2), tokenizer=3), "makes tokens of texts .*; got a int"),
        (lambda: untyped.quantize("folder", out=3), "the output folder is a path; got a int"),
        (lambda: untyped.quantize("folder", out=f"{__file__}/x"), "test_python.py is a file, so .*/x can't be in it"),
        (lambda: untyped.save(None, "new"), "a quantized model; got a NoneType"),
        (lambda: untyped.save(nn.Linear(2, 2), None), "the output folder is a path; got a NoneType"),
        (lambda: untyped.save(nn.Linear(2, 2), "new", "x"), r"\(it has save_pretrained\); got a str"),
        (lambda: untyped.load(3), "a folder, a GGUF file or a hub id; got a int"),
        (lambda: untyped.load(nn.Linear(2, 2)), "got a Linear"),
        (lambda: untyped.Quantizer("int4").quantize([1.0, 2.0]), "is a tensor; got a list. torch.as_tensor"),
        (lambda: untyped.Quantizer("int4").fit(np.ones(4)), "is a tensor; got a ndarray"),
        (
            lambda: untyped.Quantizer("int4").fake_quantize(torch.ones(2, dtype=torch.complex64)),
            "complex64 have no form",
        ),
    ],
)
def test_arguments_of_another_type_or_name(call: Callable[[], Any], says: str) -> None:
    """They were TypeErrors, or half of what was given."""
    with pytest.raises(nybble.NybbleError, match=says):
        call()


def test_a_solver_that_answers_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, came in ((None, "a NoneType"), ([], "0 of 1")):
        monkeypatch.setattr(Rtn, "solve", lambda self, weights, stats, answer=answer: answer)
        with pytest.raises(UsageError, match=rf"Rtn\.solve returned {came}; it returns a list"):
            nybble.quantize(nn.Sequential(nn.Linear(8, 8)), weights="int4")


def test_arrays_are_data_too() -> None:
    ids = np.arange(16).reshape(2, 8)
    found = [nybble.quantize(tiny_model(), "gptq", data, weights=LINE)[0] for data in (ids, torch.from_numpy(ids))]
    found.append(
        nybble.quantize(tiny_model(), "gptq", [{"input_ids": part} for part in (ids[:1], ids[1:])], weights=LINE)[0]
    )
    first, *others = (dict(model.named_buffers()) for model in found)
    assert first and all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_preflight_does_nothing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    lines = nybble.preflight(folder, weights=LINE, out=tmp_path / "out")
    assert lines[0].startswith("14 weights in 2 blocks") and not list(tmp_path.glob("out*"))
    with pytest.raises(SchemeError, match="matches no module"):
        nybble.preflight(folder, weights=LINE, ignore=["nosuch"])


def test_the_names_are_listed() -> None:
    assert {"quantize", "load", "Quantizer", "Scheme", "Settings", "optim"} <= set(dir(nybble))
    assert not {"annotations", "importlib", "Any"} & set(dir(nybble))
    for name in nybble.__all__:
        assert getattr(nybble, name) is not None
    assert isinstance(nybble.preflight, type(test_the_names_are_listed)) and nybble.Scheme is Scheme


def test_type_checkers_see_the_same_names() -> None:
    """What stands under TYPE_CHECKING is what ``__getattr__`` finds."""
    import ast

    spec = importlib.util.find_spec("nybble")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    typed = {
        alias.name: node.module
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in test.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    # The rooms of export targets and of searches are called, too: as the pipelines.
    assert typed == {
        **nybble._NAMES,
        "optim": "nybble",
        "export": "nybble.pipelines.export",
        "search": "nybble.pipelines.search",
    }
    assert (Path(spec.origin).parent / "py.typed").is_file()


def correlated(*shape: int) -> torch.Tensor:
    """Inputs that a solver which sees them gains from: a few directions carry most of their energy."""
    draw = torch.Generator().manual_seed(5)
    mix = torch.randn(shape[-1], shape[-1], generator=draw) * torch.logspace(0, -2, shape[-1])
    return torch.randn(*shape, generator=draw) @ mix


class Named(nn.Module):
    """Its second input has a default; both have names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.first(x if gain is None else x * gain).relu()
        found: torch.Tensor = self.second(hidden)
        return found


@pytest.mark.parametrize("shape", [(200, 64), (20, 10, 64)])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: nn.Linear(64, 32), lambda x: x),
        (lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), lambda x: x),
        (Named, lambda x: {"gain": torch.linspace(0.5, 2, len(x)).view(-1, *(1,) * (x.dim() - 1)), "x": x}),
        (Named, lambda x: [{"x": row[None]} for row in x]),
    ],
)
def test_plain_networks_are_calibrated(make: Any, data: Any, shape: tuple[int, ...]) -> None:
    x = correlated(*shape)
    torch.manual_seed(1)
    net, given = make(), data(x)
    inputs = given if isinstance(given, dict) else {}
    state = net.state_dict()

    def lost(recipe: str, **options: Any) -> float:
        again = make()
        again.load_state_dict(state)
        found, report = nybble.quantize(again, recipe, given, weights="int3 channel", **options)
        assert len(report.layers) == len(list(quant_modules(found))) and not any(row.notes for row in report.layers)
        with torch.no_grad():
            exact, came = (model(**inputs) if inputs else model(x) for model in (net, found))
        return float((came - exact).norm() / exact.norm())

    assert lost("gptq") < 0.7 * lost("rtn")
    assert lost("rtn", activations="int8 tensor static") < 1.2 * lost("rtn")
    with pytest.raises(UsageError, match=r"a plain network is given tensors, as it is called with them"):
        nybble.quantize(make(), "gptq", weights="int3 channel")


def test_a_head_alone_is_calibrated() -> None:
    scheme = {"targets": ["lm_head"], "weights": "int4 group=16", "inputs": "int8 tensor static", "ignore": []}
    model, ids = tiny_model("mistral"), torch.randint(3, 50, (8, 24), generator=torch.Generator().manual_seed(0))
    found, report = nybble.quantize(model, "gptq", ids, scheme=scheme)
    (row,) = report.layers
    assert row.error is not None and row.rtn_error is not None and row.error < row.rtn_error and not row.notes
    assert [name for name, _ in quant_modules(found)] == ["lm_head"]


def test_what_data_may_be_called() -> None:
    """Texts longer than a file's name, records with fields beside the text, a device that isn't there."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(NybbleError, match="data"):
        nybble.quantize(model, "gptq", "word " * 2000, tokenizer=tokenizer, weights=LINE)
    rows = [{"text": "ba " * 200, "id": 3, "target": torch.ones(2)}]
    settings = {"samples": 2, "seq_len": 8}
    nybble.quantize(model, "gptq", rows, tokenizer=tokenizer, weights=LINE, settings=settings)
    with pytest.raises(DeviceError, match="no CUDA device"):
        nybble.load("anything", device="cuda")
