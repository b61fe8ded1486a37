"""Q-ASR: inputs from BatchNorm statistics, ranges by moving averages, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from tests.speech import tiny_recognizer
from tests.tiny import tiny_model
from torch import Tensor, nn
from torch.ao.quantization import MovingAverageMinMaxObserver

import nybble
from nybble.calibration.statistics import Range
from nybble.calibration.synthesis import Synthesis, SyntheticSamples, divergence, gaussian_kl, synthesise
from nybble.core.errors import DataError, ModelError, NybbleError, UsageError
from nybble.nn.batchnorm import find_folds
from nybble.pipelines.evaluate import run_eval
from nybble.qtensor import dense
from nybble.quantizer import Quantizer
from nybble.walk.settings import Settings

QUICK = Synthesis(samples=12, batch=8, iterations=200, lr=0.05, seed=3)


def real(count: int) -> Tensor:
    """Images with a place, a size and neighbours alike, unlike noise of any deviation: [count, 3, 10, 10]."""
    x = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))
    smooth = nn.functional.avg_pool2d(x, 3, 1) * 3
    return smooth + torch.tensor([1.0, -0.5, 0.25]).view(1, 3, 1, 1)


def trained() -> nn.Sequential:
    """A network whose BatchNorms have seen real inputs, residual branch included, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3),
            nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for seed in range(1, 9):
            net.train()(real(40 + seed))
    return net.eval()


@pytest.fixture(scope="module")
def made() -> SyntheticSamples:
    return synthesise(trained(), {"input": torch.zeros(1, 3, 10, 10)}, QUICK)


# ---------------------------------------------------------------------------------------------------------- synthesis
def test_the_divergence_is_torchs_and_zero_where_statistics_match() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, generator=rng, dtype=torch.float64) for _ in range(2))
    s, t = (torch.rand(7, generator=rng, dtype=torch.float64) + 0.1 for _ in range(2))
    normal: Any = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(a, s.sqrt()), normal(b, t.sqrt()))
    assert torch.allclose(gaussian_kl(a, s, b, t), wanted) and (wanted > 0).all()
    assert torch.equal(gaussian_kl(a, s, a, s), torch.zeros_like(a))
    left = [x.requires_grad_() for x in (b, t)]
    assert torch.autograd.gradcheck(lambda m, v: gaussian_kl(a, s, m, v), left)


@torch.no_grad()
def test_the_divergence_is_of_what_convolutions_give() -> None:
    """Layer by layer, the sum of channels' means; the variance is the unbiased one."""
    net = trained()
    x = real(6)
    wanted = 0.0
    for at in (0, 3):
        given, norm = net[: at + 1](x), cast(Any, net[at + 1])
        spread = given.transpose(0, 1).flatten(1)
        kl = gaussian_kl(norm.running_mean, norm.running_var, spread.mean(1), spread.var(1))
        wanted += float(kl.mean())
    assert float(divergence(net, {"input": x})) == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_inputs_come_to_what_the_norms_remember(made: SyntheticSamples) -> None:
    assert made.inputs["input"].shape == (12, 3, 10, 10)
    assert made.losses[1] < 0.1 * made.losses[0]
    net, own = trained(), made.inputs["input"][:8]
    noise = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for other in (noise, noise * 0.1):
        assert divergence(net, {"input": own}) < 0.6 * divergence(net, {"input": other})
        for at in (0, 3):  # as are means and variances, layer by layer
            errors = [_off(net, at, x) for x in (own, other)]
            assert errors[0] < 0.8 * errors[1]


def _off(net: nn.Sequential, at: int, x: Tensor) -> float:
    norm: Any = net[at + 1]
    given = net[: at + 1](x).transpose(0, 1).flatten(1)
    off = (given.mean(1) - norm.running_mean).abs() + (given.std(1) - norm.running_var.sqrt()).abs()
    return float(off.mean())


def test_a_seed_tells_all_bytes() -> None:
    net, example = trained(), {"input": torch.zeros(1, 3, 10, 10)}
    before = copy.deepcopy(net.state_dict())
    short = Synthesis(samples=10, batch=4, iterations=5, seed=1)
    once, again = synthesise(net, example, short), synthesise(net, example, short)
    assert once.sha256 == again.sha256 and torch.equal(once.inputs["input"], again.inputs["input"])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    fewer = synthesise(net, example, Synthesis(samples=8, batch=4, iterations=5, seed=1))
    assert torch.equal(fewer.inputs["input"], once.inputs["input"][:8])
    assert synthesise(net, example, Synthesis(samples=10, batch=4, iterations=5, seed=2)).sha256 != once.sha256


@torch.no_grad()
def test_ranges_are_about_those_of_real_inputs(made: SyntheticSamples) -> None:
    """Within a small factor, and the quantized network much nearer than after noise."""
    net, own = trained(), made.inputs["input"]
    noise = 0.3 * (2 * torch.rand(12, 3, 10, 10, generator=torch.Generator().manual_seed(0)) - 1)
    seen, held, lost = real(12), real(64), {}
    for at in (3, 8):
        top = {name: float(net[:at](x).amax()) for name, x in (("made", own), ("real", seen))}
        assert 0.4 < top["made"] / top["real"] < 2.5
    exact = net(held)
    for name, x in (("made", own), ("real", seen), ("noise", noise)):
        done, _ = nybble.quantize(
            copy.deepcopy(net), "minmax-int", x, weights="int8 channel", activations="int8 tensor static"
        )
        lost[name] = float((done(held) - exact).norm() / exact.norm())
    assert lost["made"] < 0.3 * lost["noise"] and lost["real"] < 0.3 * lost["noise"]


# ------------------------------------------------------------------------------------------------------------ as data
def test_a_recognizer_needs_no_data(tmp_path: Path) -> None:
    model = tiny_recognizer()
    model.save_pretrained(tmp_path / "m")
    settings = Settings(dtype="bfloat16", batch=2, seed=5)
    given: dict[str, Any] = {"weights": "int8 channel", "activations": "int8 tensor static", "settings": settings}
    _, here = nybble.quantize(str(tmp_path / "m"), "minmax-int", "synthetic:2", **given)
    made = here.manifest["data"]
    assert made["source"] == "synthetic:2" and made["samples"] == 2 and made["divergence"][1] < made["divergence"][0]
    with pytest.raises(UsageError, match="synthesised inputs calibrate"):
        run_eval({"m": str(tmp_path / "m")}, "synthetic")


def image_net() -> Any:
    make: Any = transformers.ResNetConfig
    config = make(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    return cast(Any, transformers.ResNetForImageClassification)(config).eval()


def test_an_image_network_needs_none_either() -> None:
    model = image_net()
    settings = Settings(samples=2, batch=2)
    _, found = nybble.quantize(model, "minmax-int", "synthetic", settings=settings, weights="int8 channel")
    assert found.manifest["data"]["samples"] == 2


@pytest.mark.parametrize(
    ("model", "data", "kind", "message"),
    [
        (lambda: tiny_model("llama"), "synthetic", ModelError, "LlamaForCausalLM has no BatchNorm.* Give data"),
        (image_net, "synthetic:0", UsageError, "with a count above 0"),
        (image_net, "synthetic:few", UsageError, "with a count above 0"),
        (trained, "synthetic:2", DataError, r"nothing says how large inputs of .*synthesise\(model, example\)"),
    ],
)
def test_what_cannot_be_synthesised(model: Any, data: str, kind: type[NybbleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        nybble.quantize(model(), "minmax-int", data, weights="int8 channel", activations="int8 tensor static")


def test_statistics_that_are_no_numbers_are_said() -> None:
    net = trained()
    norm: Any = net[1]
    norm.running_mean[2] = torch.nan
    with pytest.raises(ModelError, match="come to NaN or infinity: look at the statistics of its BatchNorms"):
        synthesise(net, {"input": torch.zeros(1, 3, 10, 10)}, Synthesis(samples=2, iterations=2))
    with pytest.raises(DataError, match="inputs that are moved by a gradient are float"):
        synthesise(trained(), {"ids": torch.zeros(1, 3, dtype=torch.int64)})


def test_every_norm_of_a_recognizer_is_behind_a_convolution() -> None:
    model = tiny_recognizer(dense=True)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = find_folds(model.net, lambda: model(x))
    norms = [name for name, module in model.net.named_modules() if isinstance(module, nn.BatchNorm1d)]
    assert sorted(found) == sorted(norms)


# ------------------------------------------------------------------------------------------------- recipe, its ranges
def seen(batches: list[Tensor], line: str) -> Any:
    found = Range(sum(batch.numel() for batch in batches))
    for batch in batches:
        found.add(batch)
    return found.fit(Quantizer(line), "it")


def test_ranges_are_averages_of_batches() -> None:
    """By torch's own observers: the moving average's 0.05 is our 0.95; a percentile is numpy's."""
    rng = torch.Generator().manual_seed(0)
    batches = [(i + 1) * torch.randn(40, 8, generator=rng) + 0.3 for i in range(5)]
    theirs = MovingAverageMinMaxObserver(averaging_constant=0.05)
    for batch in batches:
        theirs(batch)
    wanted = max(-theirs.min_val.item(), theirs.max_val.item()) / 127
    assert seen(batches, "int8 static scale=ema").scale.item() == pytest.approx(wanted, rel=1e-6)
    biggest = max(batch.abs().max().item() for batch in batches) / 127
    assert wanted < biggest
    assert seen(batches, "int8 static scale=ema(momentum=-1)").scale.item() == pytest.approx(biggest, rel=1e-6)
    with_ends = [np.append(b.numpy().ravel(), [b.min(), b.max()]) for b in batches]  # a sample, with the extremes
    low, high = ([np.quantile(b, share) for b in with_ends] for share in (0.01, 0.99))
    far = max(-min(low), max(high)) / 31
    found = seen(batches, "int6 static scale=ema(momentum=-1,p=99)").scale.item()
    assert found == pytest.approx(far, rel=1e-5) and found < seen(batches, "int6 static scale=ema(momentum=-1)").scale


def test_what_is_never_negative_has_all_codes() -> None:
    line = "int8_full static scale=ema(one_sided=true)"
    positive = [torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    x = positive[0]
    params = seen(positive, line)
    codes = Quantizer(line).quantize(x, params)
    top = x.max().item()
    assert params.scale.item() == pytest.approx(top / 255, rel=1e-6) and dense(params.zero_point).item() == -128
    unsigned = torch.fake_quantize_per_tensor_affine(x, params.scale.item(), 0, 0, 255)  # k + 1 signed bits, as k bits
    assert torch.allclose(codes.dequantize(), unsigned, atol=1e-6)
    both = seen([x - 0.5], line)
    assert dense(both.zero_point).item() == 0 and both.scale.item() == pytest.approx((x - 0.5).abs().max().item() / 127)
    assert seen([torch.zeros(4, 4)], line).scale.item() > 0


@pytest.mark.parametrize("rule", ["ema(p=50)", "ema(p=101)", "ema(momentum=1)", "ema(momentum=-2)"])
def test_odd_averages_are_refused(rule: str) -> None:
    with pytest.raises(UsageError, match=r"ema\((p|momentum)="):
        Quantizer(f"int8 static scale={rule}")


def test_nothing_and_nan_have_no_range() -> None:
    with pytest.raises(DataError, match="no calibration input reached it"):
        seen([], "int8 static scale=ema")
    with pytest.raises(DataError, match="NaN or Inf"):
        seen([torch.tensor([[1.0, torch.nan]])], "int8 static scale=ema")


def test_the_recipe_in_all_its_widths() -> None:
    """W8A8, W6A8, W6A6: every convolution in integers, BatchNorms gone, inputs behind a ReLU in all codes."""
    model, example = tiny_recognizer(), {"input_features": torch.zeros(1, 60, 16)}
    given = synthesise(model, example, Synthesis(samples=8, iterations=20, lr=0.05)).inputs
    x = torch.randn(8, 40, 16, generator=torch.Generator().manual_seed(0))
    exact, lost = model(x).logits.detach(), list[float]()
    inputs = "int{}_full tensor static scale=ema(p=99.996,one_sided=true)"
    for weights, bits in ((8, 8), (6, 8), (6, 6)):
        done, report = nybble.quantize(
            copy.deepcopy(model), "q-asr", given, weights=f"int{weights} channel", activations=inputs.format(bits)
        )
        assert len(report.layers) == 16 and not any(isinstance(m, nn.BatchNorm1d) for m in done.modules())
        zeros = {n: int(m.zero_point) for n, m in done.net.named_modules() if hasattr(m, "zero_point")}
        low = -(2 ** (bits - 1))
        behind_relu = {name.removesuffix(".inputs") for name, zero in zeros.items() if zero == low}
        assert set(zeros.values()) == {0, low}
        assert "classify" in behind_relu and not any(n.startswith("first") for n in behind_relu)
        with torch.no_grad():
            lost.append(float((done(x).logits - exact).norm() / exact.norm()))
    assert lost[0] < lost[1] < lost[2]
