"""Distillation behind a recipe: codes stay, what is stored moves, never to worse on samples that are held back."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import save_tiny, tiny_model
from torch import Tensor, nn
from torch.nn import functional

import nybble
from nybble.checkpoint.account import inspect
from nybble.checkpoint.parts import Parts
from nybble.core.errors import DataError, DeviceError, LearningError, ModelError, NybbleError, SchemeError
from nybble.core.progress import Silent
from nybble.core.seeds import generator
from nybble.learned._of_packed import learn_scales
from nybble.learned.frozen_codes import Exponents, Frozen, has_powers
from nybble.nn.packed import Packed
from nybble.pipelines import finished
from nybble.pipelines.report import collect
from nybble.qtensor import QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, parse_recipe
from nybble.report.learning import unmoved, windows_of
from nybble.report.page import render
from nybble.training.learners import unit_of
from nybble.training.steps import Finish, Preparation, Student, _teaching, make_train_step
from nybble.training.steps._adam import Adam
from nybble.training.steps._distillation import Distillation

TWO = "int2 group=16 symmetric=false"
LINES = (
    TWO, "int4 channel", "nvfp4", "mxfp4", "nf4 flat=64 scale_format=(dynamic8 flat=32 center=mean)",
    "int3 group=16 scale=minmax(offset=true)", "float4_e2m1fn block=8x16", "binary channel scale=mean(offset=true)",
)  # fmt: skip
SETTINGS = nybble.Settings(samples=16, seq_len=16, batch=4, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(samples: int = 16) -> Tensor:
    return torch.randint(3, 300, (samples, 16), generator=torch.Generator().manual_seed(0))


def recipe(weights: str = TWO, scheme: dict[str, Any] | None = None, solver: str = "gptq", **options: Any) -> Recipe:
    """A solver, and distillation where there are options for it."""
    step = {"train": "distill", "steps": 12, "every": 4, "rates": {"default": 5e-3}, **options}
    steps = [{"solver": solver}, *([step] if options.pop("on", True) else [])]
    return parse_recipe({"name": "made", "scheme": scheme or {"weights": weights}, "steps": steps})


def run(made: Recipe, model: Any = None, data: Any = None) -> tuple[Any, Any]:
    model = tiny_model(dtype=torch.float32) if model is None else model
    return nybble.quantize(model, made, tokens() if data is None else data, settings=SETTINGS)


def plain(made: Recipe) -> Recipe:
    """Without what trains."""
    found = made.to_dict()
    found["steps"] = [step for step in found["steps"] if "train" not in step]
    return parse_recipe(found)


def packs(model: nn.Module) -> dict[str, QTensor]:
    return {name: m.qtensor() for name, m in model.named_modules() if isinstance(m, Packed)}


def entry(report: Any) -> dict[str, Any]:
    """What the report says of it, from the layer that has the curve."""
    windows = [w for row in report.layers for w in (row.learned or {}).get("windows", ()) if "curve" in w]
    assert len(windows) == 1
    found: dict[str, Any] = windows[0]
    return found


# ------------------------------------------------------------------------------------------------ what learns
def matrix(seed: int = 0) -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("around", ["", "low-rank", "outer"])
def test_it_begins_at_what_is_stored_with_any_codes(line: str, around: str) -> None:
    """Of codes that aren't the nearest ones; its values are the stored ones, also after the scales moved."""
    quantizer = Quantizer(line)
    params = quantizer.fit(matrix())
    packed: QTensor = quantizer.pack(quantizer.quantize(matrix(1), params).unpacked(), params)
    if around:
        a, b = torch.randn(32, 2), torch.randn(2, 64)
        packed = LowRankSum(packed, a, b) if around == "low-rank" else OuterScaled(packed, (a[:, :1], b[:1]))
    learned = learn_scales(packed, [Quantizer("int8"), quantizer])
    assert learned is not None
    nothing = torch.zeros(()).expand(32, 64)
    assert torch.equal(learned.estimate(nothing), packed.dequantize())
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.mul_(2.2)  # more than a power of two
    settled = learned.settle(nothing)
    assert isinstance(settled, QTensor) and settled.spec() == packed.spec()
    assert torch.equal(learned.estimate(nothing), settled.dequantize())
    moved = [name for name, tensor in settled.tensors().items() if not torch.equal(tensor, packed.tensors()[name])]
    assert moved and all("scale" in name or "offset" in name for name in moved)


def test_the_gradient_is_the_closed_form() -> None:
    """EfficientQAT's: for a group of a scale, the sum over its values of (q - z) times the gradient by the weight."""
    quantizer = Quantizer("int2 group=16 symmetric=false scale_format=float32")
    packed, pull = quantizer.quantize(matrix()), matrix(5)
    learned = learn_scales(packed, [quantizer])
    assert learned is not None
    (learned.estimate(torch.zeros(()).expand(32, 64)) * pull).sum().backward()  # type: ignore[no-untyped-call]
    (scale,) = learned.groups()["scales"]
    want = (packed.dequantize().view(32, 4, 16) / packed.params.scale.view(32, 4, 1) * pull.view(32, 4, 16)).sum(-1)  # type: ignore[union-attr]
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.view(32, 4), want, rtol=1e-5, atol=1e-5)
    assert scale.numel() == packed.dequantize().numel() // 16


def test_weights_without_scales_of_their_own_are_left() -> None:
    assert learn_scales(Quantizer("int4 rank1").quantize(matrix()), [Quantizer("int4 rank1")]) is None
    learned = learn_scales(Quantizer(TWO).quantize(matrix()), [Quantizer("int2 group=32 symmetric=false")])
    assert learned is not None and learned.quantizer == Quantizer(f"{TWO} scale_format=float16")  # by its own tensors


# ------------------------------------------------------------------------------------------------ whole models
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "nll"},
        {"loss": "mse"},
        {"top_k": 20},
        {"temperature": 2.0},
        {"what": ["scales", "norms", "biases"]},
    ],
    ids=str,
)
def test_codes_stay_and_the_loss_falls(options: dict[str, Any]) -> None:
    made = recipe(**options)
    model, report = run(made)
    before, _ = run(plain(made))
    found = entry(report)
    assert found["after"] < found["before"] and found["curve"]
    was, now = packs(before), packs(model)
    assert was.keys() == now.keys()
    for name, packed in now.items():
        first = was[name]
        assert isinstance(packed, BlockQTensor) and isinstance(first, BlockQTensor)
        assert torch.equal(packed.codes, first.codes)
        zero = [p.params.zero_point.tensors()["codes"] for p in (packed, first)]  # type: ignore[union-attr]
        assert torch.equal(*zero)
    assert any(not torch.equal(now[name].dequantize(), was[name].dequantize()) for name in now)
    norms = [torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters() if "norm" in n]
    assert all(norms) == ("norms" not in options.get("what", ()))
    for name, parameter in model.named_parameters():
        like = before.get_parameter(name)
        assert (parameter.dtype, parameter.requires_grad) == (like.dtype, like.requires_grad), name
    assert all(any("held back" in note for note in row.notes) for row in report.layers)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_experts_and_other_layers(family: str) -> None:
    scheme = {"targets": ["Experts", "Linear"] if family == "mixtral" else ["Linear"], "weights": TWO}
    _, report = run(recipe(scheme=scheme), tiny_model(family, dtype=torch.float32))
    assert entry(report)["after"] < entry(report)["before"]
    assert all(row.learned for row in report.layers)


@pytest.mark.parametrize("inputs", ["int8 tensor static", "nvfp4"])
def test_activation_quantizers_are_in_place(inputs: str) -> None:
    _, report = run(recipe(scheme={"weights": TWO, "inputs": inputs}, steps=20))
    assert entry(report)["after"] < entry(report)["before"]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("top_k", [0, 300, 5000, 20])
def test_the_loss_is_torchs(top_k: int) -> None:
    """KL of held-back samples before any step: of all logits, and less of the largest alone with the rest as one."""
    made = recipe(steps=1, rates={"default": 0.0}, top_k=top_k, temperature=2.0)
    model, report = run(made)
    held = torch.randperm(16, generator=generator(0, "distill", "held"))[:2]
    teacher, student = (logits(m, tokens()[held]) / 2 for m in (tiny_model(dtype=torch.float32), model))
    want = functional.kl_div(
        student.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    found = entry(report)["before"]
    if top_k == 20:
        assert 0 < found < 4 * float(want)
    else:
        assert found == pytest.approx(4 * float(want), rel=1e-3)  # four digits are kept
    assert entry(report)["kept"] == "start"


def test_next_token_loss_is_the_models_own() -> None:
    model, report = run(recipe(steps=1, rates={"default": 0.0}, loss="nll"))
    held = torch.randperm(16, generator=generator(0, "distill", "held"))[:2]
    ids = tokens()[held]
    with torch.no_grad():
        want = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert entry(report)["before"] == pytest.approx(want, rel=1e-3)


def test_padding_counts_for_nothing() -> None:
    """Samples of 10 tokens, padded to 16 by other tokens: the same loss as of other padding."""
    mask = torch.ones(16, 16, dtype=torch.int64)
    mask[:, 10:] = 0
    found = []
    for seed in (1, 2):
        ids = tokens()
        ids[:, 10:] = torch.randint(3, 300, (16, 6), generator=torch.Generator().manual_seed(seed))
        for loss in ("kl", "nll"):
            data = {"input_ids": ids, "attention_mask": mask}
            found.append(entry(run(recipe(solver="rtn", loss=loss, steps=2), data=data)[1])["curve"])
    assert found[0] == found[2] and found[1] == found[3]


def test_gradients_add_up_over_parts_of_a_batch() -> None:
    """One sample at a time or all of a batch: the same scales but for the order of sums."""
    one, whole = (packs(run(recipe(micro=micro, steps=3, every=3))[0]) for micro in (1, 8))
    for name in one:
        torch.testing.assert_close(one[name].dequantize(), whole[name].dequantize(), rtol=2e-3, atol=1e-4)


def test_the_gradient_is_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows counted 8 times, with their losses, say nothing new: what ``max_norm`` and ``relative: false`` go by."""
    real, step, found = _teaching.Teaching.lost, Adam.step, dict[float, list[Tensor]]()

    def gradients(times: float) -> list[Tensor]:
        def lost(self: Any, numbers: Any) -> Any:
            loss, rows = real(self, numbers)
            return loss * times, rows * times

        def seen(self: Adam, share: float) -> None:
            found[times] = [p.grad.clone() for p in self.parameters if p.grad is not None]
            step(self, share)

        monkeypatch.setattr(_teaching.Teaching, "lost", lost)
        monkeypatch.setattr(Adam, "step", seen)
        run(recipe(solver="rtn", micro=2, steps=1))
        return found[times]

    pairs = list(zip(gradients(1.0), gradients(8.0), strict=True))
    assert pairs and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("line", [TWO, "nf4 flat=64 scale_format=(dynamic8 flat=32 center=mean)", "binary channel"])
def test_weights_are_made_once_a_step(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all may be there: whatever the parts of a batch, once a step and once a look; else the same scales."""
    scheme = {"weights": line}
    calls = []
    plain_estimate = Frozen.estimate

    def counted(self: Frozen, x: Tensor) -> Tensor:
        calls.append(self)
        return plain_estimate(self, x)

    monkeypatch.setattr(Frozen, "estimate", counted)
    settings: dict[str, Any] = {"scheme": scheme, "solver": "rtn", "micro": 2, "steps": 3, "every": 3}
    once = packs(run(recipe(**settings))[0])
    assert len(calls) == (3 + 2) * len(once)  # steps and looks
    calls.clear()
    anew = packs(run(recipe(**settings, dense_gb=0.0))[0])
    assert len(calls) > 3 * 4 * len(anew)
    for name in once:
        torch.testing.assert_close(once[name].dequantize(), anew[name].dequantize(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("line", LINES)
def test_its_own_gradient_is_autograds(line: str) -> None:
    """Bit for bit that of the quantizer's differentiable form, which keeps every step."""
    quantizer = Quantizer(line)
    packed, pull = quantizer.quantize(matrix()), matrix(5)
    learned = learn_scales(packed, [quantizer])
    if not isinstance(learned, Frozen):
        pytest.skip("its scales don't learn by themselves")
    x, found = torch.zeros(()).expand(32, 64), []
    blocks = quantizer.granularity.to_blocks(learned.codes)
    for values in (learned.estimate(x), quantizer.soft(x, learned.params(), lambda _, grid: grid.decode(blocks))):
        gradients = torch.autograd.grad((values * pull).sum(), list(learned.groups()["scales"]))
        found.append((values, *gradients))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_adam_is_torchs(share: float) -> None:
    """With a rate for every tensor, one of which gets no gradient at times."""
    draws = torch.Generator().manual_seed(0)
    mine = [nn.Parameter(torch.randn(n, 3, generator=draws)) for n in (2, 5, 7)]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    rates = [1e-3, 3e-2, 0.5]
    adam = Adam(mine, rates)
    other = torch.optim.Adam([{"params": [p], "lr": r * share} for p, r in zip(theirs, rates, strict=True)])
    for step in range(5):
        for number, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            grad = None if number == 1 and step in (0, 3) else torch.randn(p.shape, generator=draws)
            p.grad, q.grad = grad, None if grad is None else grad.clone()
        adam.step(share)
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_what_the_float_network_gives_is_kept_where_it_fits(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run once over all samples then, and the same is learned; refused room, it runs at every step."""
    made, found = list[int](), []
    plain_wanted = _teaching._wanted

    def counted(*given: Any) -> Any:
        made.append(1)
        return plain_wanted(*given)

    monkeypatch.setattr(_teaching, "_wanted", counted)
    for most in (0.0, 1.0):
        monkeypatch.setattr(_teaching, "_float_bytes", lambda _: 0)
        made.clear()
        model, report = run(recipe(solver="rtn", loss=loss, micro=2, steps=4, every=4, logits_gb=most))
        found.append((len(made), packs(model)))
        assert entry(report)["steps"] == 4
    assert found[1][0] == 16 // 2 < found[0][0]
    for name, packed in found[0][1].items():
        torch.testing.assert_close(packed.dequantize(), found[1][1][name].dequantize(), rtol=2e-3, atol=1e-4)


def test_never_worse_on_samples_held_back() -> None:
    """Rates that ruin everything: what the solver left, bit for bit, and the report says so."""
    made = recipe(rates={"default": 10.0}, what=["scales", "norms", "biases"])
    (model, report), (before, _) = run(made), run(plain(made))
    assert entry(report)["kept"] == "start" and entry(report)["after"] == entry(report)["before"]
    was, now = before.state_dict(), model.state_dict()
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)


def test_its_cost_is_the_forwards_that_it_runs() -> None:
    """In the line before a run too: every sample that went through the network, with a backward four times."""
    counts, lines = list[int](), list[str]()
    made, model = recipe(solver="rtn", steps=12, every=5, batch=8), tiny_model(dtype=torch.float32)

    def count(_: Any, args: Any, given: Any, __: Any) -> None:
        counts.append(len(given["input_ids"]) * (4 if torch.is_grad_enabled() else 1))

    model.register_forward_hook(count, with_kwargs=True)
    nybble.quantize(model, made, tokens(), settings=SETTINGS, announce=lines.append)
    step = make_train_step("distill", {"steps": 12, "every": 5, "batch": 8})
    assert sum(counts) == step.passes(16) + 8 + 2  # whether the float network's output fits; a sample at both ends
    (line,) = (line for line in lines if "(distill)" in line)
    assert re.search(r"GB of memory, \d+ s$", line)


def test_the_best_look_of_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the last one: looks are made after steps 4, 8 and 12, and the second loses least."""
    said, states = iter([4.0, 3.0, 1.0, 2.0]), list[list[Tensor]]()

    def judged(self: Distillation, held: Any) -> float:
        states.append([parameter.detach().clone() for parameter in self.parameters])
        return next(said)

    def trained(self: Distillation, numbers: Any, held: Any) -> Any:
        found = plain_train(self, numbers, held)
        states.append([parameter.detach().clone() for parameter in self.parameters])
        return found

    plain_train = Distillation.train
    monkeypatch.setattr(Distillation, "_judged", judged)
    monkeypatch.setattr(Distillation, "train", trained)
    _, report = run(recipe(solver="rtn"))
    assert (entry(report)["kept"], entry(report)["before"], entry(report)["after"]) == (8, 4.0, 1.0)
    *_, second, last, end = states
    assert all(torch.equal(one, other) for one, other in zip(second, end, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(last, end, strict=True))


def test_rates_rise_in_a_line_and_long_gradients_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, lengths, step = list[float](), list[float](), Adam.step

    def seen(self: Adam, share: float) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        shares.append(share)
        lengths.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))
        step(self, share)

    monkeypatch.setattr(Adam, "step", seen)
    for longest in (None, 1e-3):
        run(recipe(solver="rtn", steps=8, every=8, warmup=0.5, final=0.2, max_norm=longest))
    one = nn.Parameter(torch.zeros(1))  # torch's schedules are the oracle
    optimizer = torch.optim.SGD([one], lr=1.0)
    schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, 3)
    wanted = []
    for number in range(8):
        if number == 4:
            optimizer.param_groups[0]["lr"] = 1.0
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, 0.2)
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert shares[:8] == shares[8:] == pytest.approx(wanted)
    assert min(lengths[:8]) > 1e-3 and lengths[8:] == pytest.approx([1e-3] * 8, rel=1e-3)


def test_patience_ends_it_early() -> None:
    _, report = run(recipe(rates={"default": 10.0}, steps=40, every=4, patience=2))
    assert entry(report)["steps"] == 8


def test_the_callers_random_numbers_are_their_own() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run(recipe())
    assert torch.equal(torch.rand(3), want)


# ------------------------------------------------------------------------------------------------ other kinds of models
def test_a_vision_transformer_a_classifier_of_texts_and_a_plain_network() -> None:
    torch.manual_seed(0)
    kit: Any = transformers
    vit = kit.ViTForImageClassification(
        kit.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
            patch_size=8, num_labels=5,
        )
    )  # fmt: skip
    bert = kit.BertForSequenceClassification(
        kit.BertConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            num_labels=4,
        )
    )  # fmt: skip
    torch.manual_seed(7)
    cnn = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for model, data in ((vit, {"pixel_values": images}), (bert, tokens(64)), (cnn, images[:, :, :8, :8].contiguous())):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.ndim > 1 else 1)
        # Scales that clip far too much, so that there is something to gain for any weights.
        made = recipe("int4 channel scale=percentile(p=70)", solver="rtn", steps=30, every=5, held=0.5)
        _, report = nybble.quantize(model.eval(), made, data, settings=replace(SETTINGS, samples=64))
        assert entry(report)["after"] < entry(report)["before"], type(model)


def test_what_can_be_seen_beforehand_is_refused_beforehand() -> None:
    model = tiny_model(dtype=torch.float32, attention_bias=False, mlp_bias=False)
    with pytest.raises(SchemeError, match=r"finds nothing to learn.*biases"):
        nybble.preflight(model, recipe(what=["biases"]), tokens(), settings=SETTINGS)
    with pytest.raises(DataError, match="there is 1 in all"):
        nybble.preflight(model, recipe(), tokens()[:1], settings=replace(SETTINGS, samples=1))


def test_hidden_states_have_no_logits() -> None:
    kit: Any = transformers
    config = kit.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"loss=kl reads logits.*use loss: mse"):
        run(recipe(solver="rtn"), kit.BertModel(config).eval())
    _, report = run(recipe(solver="rtn", loss="mse"), kit.BertModel(config).eval())
    assert entry(report)["after"] < entry(report)["before"]


# ------------------------------------------------------------------------------------------------ folders
class Stop(BaseException):
    """A kill."""


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "times.json"}


@pytest.mark.parametrize("at", ["training", "second part", "mark", "take", "assemble"])
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The same bytes, those of the model in memory; behind the mark nothing is trained again."""
    made, source = recipe(what=["scales", "norms"]), str(save_tiny(tmp_path / "model"))
    in_memory, _ = run(made, source)
    nybble.quantize(source, made, tokens(), out=tmp_path / "whole", settings=SETTINGS)
    calls: list[str] = []

    def stop(name: str, number: int = 1) -> None:
        real = getattr(Parts, name)

        def stopping(self: Parts, *args: Any, **kwargs: Any) -> None:
            calls.append(name)
            if calls.count(name) == number:
                raise Stop
            real(self, *args, **kwargs)

        monkeypatch.setattr(Parts, name, stopping)

    ran = finished._run

    def running(*args: Any) -> Any:
        calls.append("training")
        if at == "training" and calls.count("training") == 1:
            raise Stop
        return ran(*args)

    monkeypatch.setattr(finished, "_run", running)
    if at == "second part":
        stop("write", 5)  # two blocks and what is outside them, then the trained ones
    elif at != "training":
        stop(at)
    with pytest.raises(Stop):
        nybble.quantize(source, made, tokens(), out=tmp_path / "out", settings=SETTINGS)
    nybble.quantize(source, made, tokens(), out=tmp_path / "out", settings=nybble.Settings(**{
        **{name: getattr(SETTINGS, name) for name in ("samples", "seq_len", "batch", "dtype")}, "resume": True,
    }))  # fmt: skip
    assert files(tmp_path / "whole") == files(tmp_path / "out")
    assert calls.count("training") == (1 if at in ("take", "assemble") else 2)
    loaded, _ = nybble.load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens()), logits(in_memory, tokens()))


def test_a_folder_says_how_long_everything_took(tmp_path: Path) -> None:
    """In a file of its own, and on the page; all else is as of another run."""
    source, learn = str(save_tiny(tmp_path / "model")), {"reconstruction": "mse", "weights": "frozen-codes", "steps": 2}
    steps = [{"solver": "rtn"}, learn, learn, {"train": "distill", "steps": 2}]
    made = parse_recipe({"name": "made", "scheme": {"weights": TWO}, "steps": steps})
    _, report = nybble.quantize(source, made, tokens(), out=tmp_path / "out", settings=SETTINGS)
    found = collect(tmp_path / "out")
    assert {name: len(seconds) for name, seconds in found["times"].items()} == {
        "window-0000": 2, "window-0001": 2, "model": 1,
    }  # fmt: skip
    assert report.times == found["times"]
    rows = windows_of(found["manifest"]["layers"], found["times"])
    assert [row["name"] for row in rows] == ["window-0000"] * 2 + ["model (2 blocks)"] + ["window-0001"] * 2
    assert all(row["time"].endswith(" s") for row in rows)
    assert render(found).count(" s</td><td>") >= 5
    assert inspect(tmp_path / "out")["files"]["times.json"] > 0


def test_a_model_in_memory_learns_from_itself_as_it_was(tmp_path: Path) -> None:
    source = str(save_tiny(tmp_path / "model", dtype=torch.float32))
    streamed, report = run(recipe(), source)
    held, again = run(recipe())
    assert torch.equal(logits(streamed, tokens()), logits(held, tokens()))
    assert entry(report) == entry(again)


def test_no_number_stops_with_what_was_done_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.training.steps import _teaching

    source, real, calls = str(save_tiny(tmp_path / "model")), _teaching.Teaching.lost, [0]

    def broken(self: Any, numbers: Any) -> Any:
        calls[0] += 1
        lost, rows = real(self, numbers)
        return (lost * torch.nan if calls[0] > 3 else lost), rows

    monkeypatch.setattr(_teaching.Teaching, "lost", broken)
    with pytest.raises(LearningError, match=r"loss of distill is nan at step \d.*stays in .*out.partial"):
        nybble.quantize(source, recipe(), tokens(), out=tmp_path / "out", settings=SETTINGS)
    assert (tmp_path / "out.partial" / "parts" / "block-0001.safetensors").exists()
    calls[0], model = 0, tiny_model(dtype=torch.float32)
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LearningError, match="is nan at step"):
        run(recipe(), model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in was.items())


def test_what_fails_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules, biases and which of all asks for gradients: of a network that is the caller's own."""
    model, _ = run(plain(recipe()), tiny_model("gpt_neox", dtype=torch.float32))
    model.requires_grad_(True)
    name = next(name for name, _ in model.named_parameters())
    model.get_parameter(name).requires_grad_(False)
    modules, asked = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    weights = {name: [Quantizer(TWO)] for name in packs(model)}

    def killed(self: Adam, share: float) -> None:
        raise Stop

    student = Student(
        model=model, weights=weights, blocks=[], samples=4, seed=0, token_ids=True,
        batch=lambda numbers: ({"input_ids": tokens()[numbers]}, None), teacher=lambda: model,
    )  # fmt: skip
    step = make_train_step("distill", {"what": ["scales", "norms", "biases"], "loss": "nll"})
    assert isinstance(step, Finish)
    monkeypatch.setattr(Adam, "step", killed)
    with pytest.raises(Stop):
        step.run(student, Silent())
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
    assert all(p is parameters[n] for n, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"what": []}, "names each of scales, norms, biases once"), ({"rates": {"norms": 1e-3}}, "rates names 'norms'"),
        ({"batch": 8, "micro": 3}, "no multiple"), ({"held": 1.0}, "neither 0 nor 1"), ({"every": 0}, "1 or more"),
        ({"loss": "nll", "top_k": 4}, "for loss: kl"), ({"temperature": 0.0}, "more than 0"),
        ({"steps": -1}, "0 or more"), ({"dense_gb": -1.0}, "dense_gb=-1 is 0 or more"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        make_train_step("distill", options)


def test_its_place_is_the_end() -> None:
    distill, lora = {"train": "distill"}, {"train": "restorative-lora", "steps": 1}
    made = {"name": "made", "scheme": {"weights": TWO}}
    with pytest.raises(SchemeError, match=r"can't stand between solver 'rtn' and correction 'bias'.*first or last"):
        parse_recipe({**made, "steps": [{"solver": "rtn"}, distill, {"correction": "bias"}]})
    with pytest.raises(SchemeError, match=r"works on the quantized model; put it last"):
        run(parse_recipe({**made, "steps": [distill, {"solver": "rtn"}]}))
    with pytest.raises(SchemeError, match=r"makes other float weights.*put it first"):
        run(parse_recipe({**made, "steps": [{"solver": "rtn"}, lora]}))
    assert isinstance(make_train_step("restorative-lora", {}), Preparation)
    assert parse_recipe({**made, "steps": [{"transform": "smooth"}, distill]}).steps[1].name == "rtn"


def test_too_little_and_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="there is 1 in all; give two or more"):
        run(recipe(), data=tokens(1))
    with pytest.raises(SchemeError, match=r"finds nothing to learn.*scales"):
        run(recipe("int4 rank1", solver="rtn"))


def test_turned_off_it_is_the_recipe_without_it() -> None:
    off, without = run(recipe(steps=0))[0].state_dict(), run(plain(recipe()))[0].state_dict()
    assert all(torch.equal(off[name], without[name]) for name in without)


@pytest.mark.parametrize(
    "line",
    [
        "mxfp4 group=16", "float4_e2m1fn group=16 scale=pow2-ratio",
        "int4 group=16 scale_format=(float8_e8m0fnu scale=one)",
    ],
)  # fmt: skip
def test_powers_of_two_move_by_octaves(line: str) -> None:
    """From a state where a third of the blocks has twice its scale: most come back, at the rate that others have."""
    assert has_powers(Quantizer(line)) and not any(has_powers(Quantizer(other)) for other in (TWO, "nvfp4"))
    packed = Quantizer(line).quantize(matrix())
    learned = learn_scales(packed, [Quantizer(line)])
    assert learned is not None
    (exponents,) = (p for p in learned.groups()["scales"] if isinstance(p, Exponents))
    wrong, nothing = torch.arange(exponents.numel()).view(exponents.shape) % 3 == 0, torch.zeros(()).expand(32, 64)
    with torch.no_grad():
        exponents[wrong] -= 0.7  # to the next one below
    before = learned.estimate(nothing).detach()
    adam = Adam([exponents], [1e-3 * unit_of(exponents, True)])
    for _ in range(100):
        exponents.grad = None
        (learned.estimate(nothing) - matrix()).square().sum().backward()  # type: ignore[no-untyped-call]
        adam.step(1.0)
    after = learned.estimate(nothing).detach()
    first, last, best = ((w - matrix()).square().mean() for w in (before, after, packed.dequantize()))
    assert last - best < 0.2 * (first - best)


# ------------------------------------------------------------------------------------------------ optional
@pytest.mark.parametrize(
    ("options", "line", "said"),
    [
        ({"dense_gb": 1e-6}, TWO, "dense weights and gradients don't fit the step's dense_gb"),
        ({"logits_gb": 1e9}, TWO, "GB are needed on cpu and .* are free"),
        ({"held": 0.97}, TWO, "distill trains on some samples"),
    ],
)  # fmt: skip
def test_an_optional_one_is_left_out_with_a_line(options: dict[str, Any], line: str, said: str) -> None:
    """The result is that of the recipe without it, and its record names no step that wasn't done."""
    made, lines = recipe(line, optional=True, **options), list[str]()
    model, report = nybble.quantize(
        tiny_model(dtype=torch.float32), made, tokens(), settings=SETTINGS, announce=lines.append
    )
    without, _ = run(plain(made))
    assert len([text for text in lines if re.search(f"^left out: train distill, as .*{said}", text)]) == 1
    assert all(torch.equal(t, without.state_dict()[name]) for name, t in model.state_dict().items())
    assert "distill" not in str(report.manifest["recipe"])
    with pytest.raises(NybbleError) if options.get("dense_gb") is None else nullcontext():
        run(recipe(line, **options))


def test_an_optional_one_is_done_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that goes on with one that left it out leaves it out, whatever there is room for now."""
    source, made = str(save_tiny(tmp_path / "model")), recipe(solver="rtn", optional=True, steps=2, every=1)
    required = recipe(solver="rtn", steps=2, every=1)
    done, needed = run(made, source)[0].state_dict(), run(required, source)[0].state_dict()
    assert done.keys() == needed.keys() and all(torch.equal(t, needed[name]) for name, t in done.items())
    real, calls = Parts.write, list[int]()

    def killed(self: Parts, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise Stop

    def full(*_: Any) -> int:
        calls.append(1)
        raise DeviceError("full")

    monkeypatch.setattr(Parts, "write", killed)
    monkeypatch.setattr(finished, "require_training", full)
    with pytest.raises(Stop):
        nybble.quantize(source, made, tokens(), out=tmp_path / "out", settings=SETTINGS)
    monkeypatch.undo()
    again = replace(SETTINGS, resume=True)
    nybble.quantize(source, made, tokens(), out=tmp_path / "out", settings=again)
    loaded, without = nybble.load(tmp_path / "out")[0], run(plain(made), source)[0]
    assert calls and torch.equal(logits(loaded, tokens()), logits(without, tokens()))


def test_the_loss_that_suits_a_model() -> None:
    """Logits where it gives any, else what it does give."""
    for loss in ("kl", "mse"):
        model = tiny_model(dtype=torch.float32)
        _, report = run(recipe(solver="rtn", loss="auto", steps=2, every=1), model if loss == "kl" else model.model)
        assert entry(report)["loss"] == f"distill, {loss}"


def test_the_report_says_that_nothing_moved() -> None:
    _, report = run(recipe(rates={"default": 10.0}))
    assert unmoved([row.to_dict() for row in report.layers]) == "what was learned came to nothing: distill, kl"
    assert any("no step was better than the start" in note for row in report.layers for note in row.notes)
