"""EfficientQAT's second phase: scales alone learn the next token, from what the first phase, or anyone else, packed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.test_train_bases import BASES
from tests.tiny import WORDS, save_text, save_tiny, shortened
from torch import Tensor, nn

import nybble
from nybble.core.errors import ModelError, NybbleError, SchemeError, UsageError
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.train import train
from nybble.recipe import load_recipe
from nybble.scheme import parse_scheme
from nybble.training.methods import Given
from nybble.training.methods.scales import HELD, PART, ScalesOptions

pytest.importorskip("accelerate", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

GROUP, TWO = 16, "int2 group=16 symmetric=false"
LOOP: dict[str, Any] = {
    "steps": 4, "batch": 4, "accumulate": 1, "seq_len": 40, "lr": 2e-3, "warmup": 0.0, "dtype": "float32"
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, what the first phase makes of it in two bits, and instructions with answers."""
    made = tmp_path_factory.mktemp("e2e")
    save_tiny(made / "model", dtype=torch.float32, hidden_size=64, intermediate_size=96)
    recipe = shortened(load_recipe("efficientqat-ap"))
    text = save_text(made / "text.txt")
    settings = {"samples": 4, "seq_len": 16, "batch": 2, "dtype": "float32"}
    nybble.quantize(made / "model", recipe, str(text), out=made / "packed", weights=TWO, settings=settings)
    rng = random.Random(0)
    with (made / "data.jsonl").open("w") as file:
        for _ in range(8):
            words = rng.choices(WORDS[3:13], k=4)
            file.write(json.dumps({"instruction": " ".join(words), "output": " ".join(words[::-1])}) + "\n")
    return made


def tuned(folder: Path, out: Path, model: Path, **more: Any) -> dict[str, Any]:
    loop = {**LOOP, **more.pop("settings", {})}
    return train("efficientqat-e2e", model, out, str(folder / "data.jsonl"), settings=loop, **more)


def tensors(place: str | Path, packed: bool = False) -> dict[str, Tensor]:
    """Of all packed weights."""
    model, _ = load_with_origin(place, dtype="float32", packed=packed)
    return {f"{name}/{part}": tensor for name, q in packs(model) for part, tensor in q.tensors().items()}


def packs(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, m.qtensor()) for name, m in model.named_modules() if isinstance(m, Packed))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of what is another than it was, without the weight's."""
    assert before.keys() == after.keys() and before
    return {name.rpartition("/")[2] for name, t in before.items() if not torch.equal(t, after[name])}


# ---------------------------------------------------------------------------------------------------- the sheet's list
def test_codes_and_zero_points_stay_and_the_loss_on_its_instructions_falls(folder: Path, tmp_path: Path) -> None:
    """Checks 5 and 6: a group's scale learns, one of 16 weights; its optimizer's states and gradients are as few."""
    found = tuned(
        folder, tmp_path / "out", folder / "packed", judged_on=str(folder / "data.jsonl"), settings={"steps": 12}
    )
    before = tensors(folder / "packed")
    assert moved(before, tensors(tmp_path / "out")) == {"scale"}
    values = sum(q.unpacked().numel() for _, q in packs(nybble.load(folder / "packed")[0]))
    assert found["trainable"] == values // GROUP
    assert found["memory"]["learned"] == found["memory"]["gradients"] == 4 * found["trainable"]
    assert found["memory"]["optimizer states"] == pytest.approx(8 * found["trainable"], rel=0.05)
    models = found["evaluation"]["models"]
    assert models["after"]["nll"] < models["before"]["nll"] - 0.1
    zeros = [t for name, t in before.items() if "zero_point" in name]
    assert len(zeros) == 14 and all(t.dtype == torch.uint8 for t in zeros)


def test_the_gradient_of_a_scale_is_the_sum_over_its_group(folder: Path) -> None:
    """Of (q - z) times the gradient to the dense weight, which torch finds in an ordinary linear layer."""
    model: Any = nybble.load(folder / "packed", dtype="float32")[0]
    dense: Any = nybble.load(folder / "packed", dtype="float32")[0]
    codes: dict[str, Tensor] = {}
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, QuantLinear):
            assert isinstance(layer.weight, Packed)
            q: Any = layer.weight.qtensor()
            scale = q.params.scale.float().repeat_interleave(GROUP, 1)
            codes[name] = (q.dequantize() / scale).round()
            plain: Any = nn.Linear(q.shape[1], q.shape[0], bias=layer.bias is not None)
            plain.weight = nn.Parameter(q.dequantize())
            plain.bias = layer.bias
            dense.set_submodule(name, plain)
    given = Given(options=ScalesOptions(), scheme=parse_scheme({"weights": TWO}), seed=0, start=None, known=())
    PART.attach(model, given)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"scale"}
    ids = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    for made in (model, dense):
        torch.autograd.backward(made(input_ids=ids, labels=ids).loss)
    learned = model.__dict__[HELD].scales
    assert len(learned) == len(codes) == 14
    for name, code in codes.items():
        (scale,) = learned[f"{name}.weight"].learned.parameters()
        wanted = (code * dense.get_submodule(name).weight.grad).unflatten(1, (-1, GROUP)).sum(-1)
        torch.testing.assert_close(scale.grad.view_as(wanted), wanted, rtol=2e-3, atol=1e-4 * float(wanted.abs().max()))


# -------------------------------------------------------------------------------------------------------------- bases
KINDS = {
    "nvfp4": ("scale.codes", 0.02),  # the scale of scales stays
    "mxfp4": ("scale.codes", 0.1),  # logarithms: it takes half an octave to the next power of two
    "int4 group=16 symmetric=false": ("scale", 2e-3),
    "nf4 flat=64 scale_format=(dynamic8 flat=256 center=mean)": ("scale.codes", 0.02),
    "float4_e2m1fn block=8x16": ("scale", 2e-3),
}


@pytest.mark.parametrize("line", KINDS)
def test_every_kind_of_scale_moves_alone(folder: Path, tmp_path: Path, line: str) -> None:
    """Two-level, powers of two, beside zero points, nested and centred, of blocks."""
    part, rate = KINDS[line]
    nybble.quantize(folder / "model", "rtn", out=tmp_path / "packed", weights=line, settings={"dtype": "float32"})
    tuned(folder, tmp_path / "out", tmp_path / "packed", settings={"lr": rate, "steps": 8})
    assert moved(tensors(tmp_path / "packed"), tensors(tmp_path / "out")) == {part}


@pytest.mark.parametrize("library", BASES)
@pytest.mark.filterwarnings("ignore:.*LLM.int8 rounds activations too")
def test_what_others_packed_learns_as_well(folder: Path, tmp_path: Path, library: str) -> None:
    """No record says of what quantizer it is: its own tensors do."""
    base, packed = BASES[library](tmp_path), library == "GGUF"
    more = {"seq_len": 120 if packed else 60, "steps": 3, "lr": 2e-4}
    found = tuned(folder, tmp_path / "out", base, packed=packed, settings=more)
    assert found["weights"] is None
    changed = moved(tensors(base, packed), tensors(tmp_path / "out"))
    assert len(changed) == 1 and changed.pop().removeprefix("part.0.").removeprefix("base.") in ("scale", "scale.codes")


def test_norms_and_biases_where_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    """And neither where they aren't."""

    def others(place: Path) -> dict[str, Tensor]:
        model = nybble.load(place, dtype="float32")[0]
        return {name: p for name, p in model.named_parameters() if "norm" in name or name.endswith("bias")}

    before, packed = others(folder / "packed"), folder / "packed"
    tuned(folder, tmp_path / "both", packed, options={"what": ["norms", "biases"], "rates": {"norms": 0.0}})
    tuned(folder, tmp_path / "scales", packed)
    after, same = others(tmp_path / "both"), others(tmp_path / "scales")
    assert before.keys() == after.keys() and len(before) == 5 + 8
    assert {n for n, p in before.items() if not torch.equal(p, after[n])} == {n for n in before if n.endswith("bias")}
    assert all(torch.equal(p, same[name]) for name, p in before.items())
    assert moved(tensors(packed), tensors(tmp_path / "both")) == set()


def test_one_error_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "mistral", dtype=torch.float32)
    nybble.quantize(tmp_path / "plain", "rtn", out=tmp_path / "packed", weights="int4 group=16")
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, dict[str, Any], type[NybbleError], str]] = [
        (
            tmp_path / "packed",
            {"options": {"what": ["biases"]}},
            ModelError,
            "nothing to learn: the model has no biases",
        ),
        (folder / "packed", {"options": {"what": []}}, SchemeError, "names each of scales, norms, biases once"),
        (folder / "packed", {"options": {"what": ["zeros"]}}, SchemeError, "what"),
        (folder / "packed", {"options": {"rates": {"norms": 1.0}}}, SchemeError, "rates: norms=1.0"),
        (folder / "packed", {"weights": "int4 group=16"}, UsageError, "is packed already"),
        (folder / "model", {"weights": "int2 group=31 symmetric=false"}, NybbleError, "group=31 does not divide"),
        (folder / "model", {"weights": "float16"}, NybbleError, "16 bits"),
    ]
    for model, more, error, wrong in cases:
        with pytest.raises(error, match=wrong):
            tuned(folder, tmp_path / "out", model, **more)
        assert sorted(tmp_path.iterdir()) == before, wrong
