"""Minifloats of 3 to 8 bits (Aggarwal et al. 2023, arXiv:2311.12359): equalised layers, grids, the recipe whole."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests.parts.models.test_cnns import images, logits, networks
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import nybble
from nybble.core.errors import SchemeError
from nybble.formats import get_format
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, parse_recipe
from nybble.transforms import make_transform
from nybble.transforms.cross_layer import find_pairs, times_columns


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize("bits", range(3, 9))
def test_one_exponent_bit_is_an_integer_grid(bits: int) -> None:
    """E1M(k-2) under its largest value's scale gives what symmetric INT(k) gives, bit for bit."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits))
    integer, minifloat = (
        Quantizer(f"{name} channel").fake_quantize(x) for name in (f"int{bits}", f"e1m{bits - 2}_finite")
    )
    # scales differ by a power of two, so every product is the same
    assert torch.equal(integer, minifloat)


def test_no_code_is_kept_back() -> None:
    """E4M3 and E5M2 of the paper aren't the OCP's; without its top code the first is."""
    e4m3, ocp = get_format("e4m3_finite"), get_format("float8_e4m3fn")
    assert (e4m3.max, get_format("e5m2_finite").max, len(e4m3.grid)) == (480, 114688, 255)
    assert set(e4m3.grid) - set(ocp.grid) == {480, -480}


@pytest.mark.parametrize(
    ("name", "error"),
    [("e2m1", 0.0132), ("int4", 0.0201), ("e3m0_finite", 0.0377), ("e2m5_finite", 4.7e-5), ("int8", 6.1e-5),
     ("e3m4_finite", 1.7e-4), ("e4m3_finite", 6.9e-4), ("e5m2_finite", 2.7e-3)],
)  # fmt: skip
def test_errors_on_normal_rows(name: str, error: float) -> None:
    """Squared error of N(0, 1), rows of 1024 under their largest; two digits are known."""
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    found = (Quantizer(f"{name} channel").fake_quantize(x) - x).square().mean()
    assert float(found) == pytest.approx(error, rel=0.05)


# ------------------------------------------------------------------------------------------------------------- pairs
class Net(nn.Module):
    """Two convolutions, a depthwise one and a linear layer; ``between`` is what happens behind the first."""

    def __init__(self, between: Any = functional.relu, both: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4)
        self.c, self.d = nn.Conv2d(8, 6, 1, bias=False), nn.Linear(6, 5)
        self.between, self.both = between, both

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.a(x))
        z = self.b(y)
        if self.both:
            z = z + y[..., 1:-1, 1:-1]
        z = functional.max_pool2d(functional.leaky_relu(z, 0.1), 2)
        z = functional.adaptive_avg_pool2d(functional.relu(self.c(functional.pad(z, (1, 1)))), 1)
        found: Tensor = self.d(z.flatten(1))
        return found


X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(4))
REST = {"b": "c", "c": "d"}


@pytest.mark.parametrize(
    ("between", "pairs"),
    [
        (functional.relu, {"a": "b", **REST}),
        (nn.ReLU(inplace=True), {"a": "b", **REST}),
        (nn.Sequential(nn.ReLU(), nn.Identity(), nn.Dropout()), {"a": "b", **REST}),
        (lambda y: y, {"a": "b", **REST}),
        (functional.relu6, REST),
        (functional.gelu, REST),
        (lambda y: y + y, REST),
        (lambda y: y * y.mean(1, keepdim=True), REST),
        (lambda y: y.transpose(1, 2)[:, :8].transpose(1, 2).flip(1), REST),
        (lambda y: functional.pad(y, (1, 1), value=1.0), REST),
    ],
)
def test_which_layers_are_pairs(between: Any, pairs: dict[str, str]) -> None:
    net = Net(between).eval()
    assert find_pairs(net, partial(net, X)) == pairs


def test_what_two_read_or_run_twice_is_no_pair() -> None:
    residual = Net(both=True).eval()
    assert find_pairs(residual, partial(residual, X)) == {"c": "d"}
    twice = nn.Sequential(layer := nn.Linear(4, 4), nn.ReLU(), layer, nn.Linear(4, 2))
    assert find_pairs(twice, partial(twice, torch.randn(2, 4))) == {}
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert find_pairs(tied, partial(tied, torch.randn(2, 4))) == {}
    given = Net().eval()
    assert find_pairs(given, lambda: {"y": (h := given.a(X)), "z": given.b(h)}) == {}  # the block gives it to others


def test_a_mean_over_channels_is_none_over_space() -> None:
    """With as many rows as channels, the shapes alone would not tell."""
    over = {1: {}, 3: {"0": "2"}}
    for dim, pairs in over.items():
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Mean(dim), nn.Conv1d(8, 4, 1))
        assert find_pairs(net, partial(net, torch.randn(2, 3, 8, 8))) == pairs


class Mean(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


def test_columns_of_grouped_convolutions() -> None:
    conv = nn.Conv2d(6, 9, 3, groups=3, bias=False)
    by, x = torch.rand(6) + 0.5, torch.randn(2, 6, 5, 5)
    expected = conv(x * by[:, None, None])
    conv.weight.data = times_columns(conv.weight.data, by, 3)
    torch.testing.assert_close(conv(x), expected)


# ------------------------------------------------------------------------------------------------------------ method
def quantized(network: Any, steps: list[dict[str, Any]], weights: str = "float16_e5m10 channel") -> Any:
    recipe = parse_recipe({"name": "x", "scheme": {"weights": weights}, "steps": [*steps, {"solver": "rtn"}]})
    settings = nybble.Settings(samples=6, batch=3, dtype=torch.float32)
    return nybble.quantize(copy.deepcopy(network), recipe, images(), settings=settings)[0]


def skewed(net: Net) -> Net:
    """Channels of very different ranges between ``a`` and ``b``; what the network computes stays."""
    by = torch.exp2(torch.randint(-4, 5, (8,), generator=torch.Generator().manual_seed(9)).float())
    assert net.a.bias is not None
    net.a.weight.data *= by.view(-1, 1, 1, 1)
    net.a.bias.data *= by
    net.b.weight.data = times_columns(net.b.weight.data, 1 / by, 4)
    return net


def test_the_float_network_stays_and_ranges_agree() -> None:
    """By 1e-5 of its logits (here float32 all the way); each pair's two ranges are the same in every channel."""
    net = skewed(Net()).eval().requires_grad_(False)
    exact = logits(net, images().pixel_values)
    same = quantized(net, [{"transform": "cross-layer", "iterations": 100, "bias": False}], "float16_e8m7 tensor")
    plain = quantized(net, [], "float16_e8m7 tensor")
    lost = [float((logits(found, images().pixel_values) - exact).norm() / exact.norm()) for found in (same, plain)]
    assert lost[0] < 0.02 and lost[1] < 0.02  # bfloat16's own rounding
    for bias in (False, True):
        transform = make_transform("cross-layer", {"iterations": 100, "bias": bias})
        state = _applied(transform, net)
        torch.testing.assert_close(logits(state.module, images().pixel_values), exact, rtol=1e-5, atol=1e-5)
        first, second = state.get("a.weight").abs().flatten(1).amax(1), state.get("b.weight")
        if bias:
            first = torch.maximum(first, state.get("a.bias").abs())
        columns = second.abs().reshape(4, 2, 2, -1).amax((1, 3)).flatten()
        torch.testing.assert_close(first, columns, rtol=1e-3, atol=0)


def _applied(transform: Any, net: nn.Module) -> Any:
    """The transform's rewrites on a copy of a network, by hand."""
    from nybble.calibration.block import BlockState
    from nybble.transforms.cross_layer import multiplying

    state = BlockState(copy.deepcopy(net), "")
    pairs = find_pairs(state.module, partial(state.module, X))
    for (first, second), factor in transform._factors(state, pairs).items():
        multiplying(state, first, second, factor).apply(state)
    return state


def test_one_scale_for_a_tensor_loses_less() -> None:
    net = skewed(Net()).eval().requires_grad_(False)
    exact = logits(net, images().pixel_values)
    errors = {}
    for name, steps in (("as it is", []), ("equalised", [{"transform": "cross-layer"}])):
        found = quantized(net, steps, "e2m3 tensor")
        errors[name] = float((logits(found, images().pixel_values) - exact).norm())
    assert errors["equalised"] < 0.7 * errors["as it is"]


@pytest.mark.parametrize("name", ["resnet", "plain", "pairs"])
def test_the_recipe_beats_rounding_to_nearest(name: str) -> None:
    """What tells images apart: the logits' distance from their mean, which bias correction alone would bring back."""
    network = made(name)
    exact, ours = apart(network), load_recipe("minifloat")
    assert [step.name for step in ours.steps] == ["fold-batchnorm", "cross-layer", "gptq", "bias"]
    steps = [{"transform": "fold-batchnorm"}, {"solver": "rtn"}]
    plain = parse_recipe({"name": "nearest", "scheme": ours.scheme.to_dict(), "steps": steps})
    lost = [float((apart(run(network, each)[0]) - exact).norm() / exact.norm()) for each in (ours, plain)]
    assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "plain"])
def test_what_is_learned_lowers_the_errors_of_its_windows(name: str) -> None:
    """From what the nearest values of the same equalised network lose, residual block by residual block."""
    recipe = load_recipe("minifloat-learned").with_effort("quick")
    assert [step.name for step in recipe.steps] == ["fold-batchnorm", "cross-layer", "rtn", "mse"]
    assert recipe.scheme == load_recipe("minifloat").scheme
    _, report = run(made(name), recipe)
    windows = [w for row in report.layers if row.learned for w in row.learned["windows"] if "curve" in w]
    assert len({w["window"] for w in windows}) == len(windows) >= 3
    lowered = [w["after"] / w["before"] for w in windows if w["kept"] == "last"]
    assert len(lowered) > len(windows) / 2 and sum(lowered) < 0.9 * len(lowered)


def made(name: str) -> Any:
    return networks()[name] if name != "pairs" else Net().eval().requires_grad_(False)


def run(network: Any, recipe: Any) -> Any:
    settings = nybble.Settings(samples=6, batch=3, dtype=torch.float32)
    return nybble.quantize(copy.deepcopy(network), recipe, images(), settings=settings)


def apart(network: Any) -> Tensor:
    """Logits without their mean over images."""
    found = logits(network, images().pixel_values)
    return found - found.mean(0)


@pytest.mark.parametrize("name", ["minifloat", "minifloat-learned"])
def test_the_recipes_on_a_vision_transformer(name: str) -> None:
    """Every linear layer of its blocks, inputs too; values and output projections are the only pairs."""
    make: Any = ViTConfig
    config = make(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    build: Any = ViTForImageClassification
    network = build(config).eval().requires_grad_(False)
    recipe = load_recipe(name)
    recipe = recipe.with_effort("quick") if name == "minifloat-learned" else recipe
    exact = logits(network, images().pixel_values)
    settings = nybble.Settings(samples=6, batch=3, dtype=torch.float32)
    found, report = nybble.quantize(network, recipe, images(), settings=settings)
    assert len(report.layers) == 2 * 6 and all(row.input_scale is not None for row in report.layers)
    assert 0 < float((logits(found, images().pixel_values) - exact).norm() / exact.norm()) < 0.3


def test_options_that_make_no_sense() -> None:
    with pytest.raises(SchemeError, match=r"alpha=1\.5 is a share"):
        make_transform("cross-layer", {"alpha": 1.5})
    with pytest.raises(SchemeError, match="iterations=0 must be 1 or more"):
        make_transform("cross-layer", {"iterations": 0})
