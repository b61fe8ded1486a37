"""Convolutional networks: kernels as matrices, BatchNorms folded, whole networks quantized, saved and loaded."""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.tiny import shortened
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)  # fmt: skip

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.trace import capture_block_calls
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import DataError, FileError, GranularityError, ModelError, SchemeError, UsageError
from nybble.corrections import bias
from nybble.data.images import ImageSamples, image_samples, preparation_for
from nybble.eval import classify
from nybble.models.adapter import adapter_for
from nybble.models.build.config_file import make_config
from nybble.models.network import as_model
from nybble.nn.batchnorm import find_folds
from nybble.nn.conv import Geometry, QuantConv
from nybble.nn.kinds import quant_modules
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.solvers import make_solver
from nybble.transforms.fold_batchnorm import FoldBatchnorm, fold_batchnorms
from nybble.walk.job import Job
from nybble.walk.plan import make_plan

INT8 = {"weights": "int8 channel", "activations": "int8 tensor static"}
CONVOLUTIONS: dict[str, Any] = {
    "plain": partial(nn.Conv2d, 4, 6, 3),
    "strided": partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1),
    "dilated": partial(nn.Conv2d, 4, 6, (3, 2), dilation=2, padding=(2, 1)),
    "grouped": partial(nn.Conv2d, 4, 6, 3, groups=2, padding=1),
    "depthwise": partial(nn.Conv2d, 4, 8, 3, groups=4, padding=1),
    "same": partial(nn.Conv2d, 4, 6, (5, 3), padding="same"),
    "valid": partial(nn.Conv2d, 4, 6, 2, padding="valid"),
    "reflected": partial(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"),
    "pointwise, no bias": partial(nn.Conv2d, 4, 6, 1, bias=False),
    "one dimension": partial(nn.Conv1d, 4, 6, 5, stride=2, padding=2, groups=2),
}


class Conv2dSame(nn.Conv2d):
    """As timm's: pads as TensorFlow does, whatever the stride."""

    def forward(self, x: Tensor) -> Tensor:
        """Padding that depends on the size of the input."""
        sides: list[int] = []
        for size, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            outputs = -(-size // stride)
            total = max((outputs - 1) * stride + kernel - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return nn.functional.conv2d(nn.functional.pad(x, sides), self.weight, self.bias, self.stride, 0, 1, self.groups)


Conv2dSame.__module__ = "timm.layers.conv2d_same"
CONVOLUTIONS["as timm's"] = partial(Conv2dSame, 4, 6, 3, stride=2)


class Plain(nn.Module):
    """A network that is no transformers model, with every kind of layer that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.free = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        x = self.wide(self.stem(x))
        y: Tensor = self.head(self.free(x).mean((2, 3)))
        return y


def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    make_resnet: Any = ResNetConfig
    make_mobile: Any = MobileNetV2Config
    resnet = make_resnet(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_labels=5)
    mobile = make_mobile(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, image_size=32, num_labels=5)
    made = {
        "resnet": ResNetForImageClassification(resnet), "mobilenet": MobileNetV2ForImageClassification(mobile),
        "plain": Plain(),
    }  # fmt: skip
    for network in made.values():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                nn.init.normal_(module.running_mean, 0, 0.2)
                for tensor in (module.running_var, module.weight):
                    nn.init.uniform_(tensor, 0.5, 2.0)
                nn.init.normal_(module.bias, 0, 0.2)
        network.eval().requires_grad_(False)
    return made


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Any:
    return networks()[request.param]


def images(count: int = 6) -> ImageSamples:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ImageSamples(pixel_values=x, labels=None, sha256="", available=count, source="random", note="")


def logits(network: Any, x: Tensor) -> Tensor:
    found: Tensor = (network if hasattr(network, "config") else as_model(network))(pixel_values=x).logits
    return found


def lost(network: Any, exact: Tensor) -> float:
    return float((logits(network, images().pixel_values) - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_quantized_convolution_is_the_convolution_with_rounded_weights(kind: str) -> None:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[kind]()
    x = torch.randn(2, 4, 11, 10) if isinstance(conv, nn.Conv2d) else torch.randn(2, 4, 11)
    packed = Quantizer("int4 channel").quantize(conv.weight.detach().flatten(1))
    ours = QuantConv(packed, conv.bias, Geometry.of(conv))
    with torch.no_grad():
        conv.weight.copy_(packed.dequantize().view_as(conv.weight))
        assert torch.allclose(ours(x), conv(x), atol=1e-6)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_patches_times_kernels_is_the_convolution(kind: str) -> None:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[kind]()
    x = torch.randn(2, 4, 11, 10) if isinstance(conv, nn.Conv2d) else torch.randn(2, 4, 11)
    rows = Geometry.of(conv).patches(x, 10**6)
    with torch.no_grad():
        bias = 0 if conv.bias is None else conv.bias.view(1, -1, 1)
        wanted = (conv(x).flatten(2) - bias).reshape(2, conv.groups, -1, conv(x)[0, 0].numel())
        kernels = conv.weight.flatten(1).view(conv.groups, -1, rows.shape[-1])
        cut = rows.view(conv.groups, 2, -1, rows.shape[-1])
        assert torch.allclose(torch.einsum("gnpc,goc->ngop", cut, kernels), wanted, atol=1e-5)
    assert Geometry.of(conv).patches(x, 7).shape[-2] <= 14


@pytest.mark.parametrize("network", ["resnet", "mobilenet", "plain"], indirect=True)
def test_folding_batchnorms_changes_nothing(network: Any) -> None:
    model = network if hasattr(network, "config") else as_model(network)
    adapter = adapter_for(model)
    (name,) = adapter.block_names(model)
    x = images().pixel_values
    exact = logits(model, x)
    targets = make_plan(model, adapter, build_recipe("minmax-int").scheme, make_solver("rtn", {})).blocks[0]
    state = BlockState(model.get_submodule(name), name, None, targets)
    block = state.module
    before = sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    call = capture_block_calls(model, {"pixel_values": x}, adapter=adapter)[0]
    calibration = Calibration(
        tokens=6, samples=6, batches=1, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=model.config
    )
    window = Window([state], calibration, lambda path, order: [([call], call.start or {})], "block-0000")
    FoldBatchnorm().run(window, adapter, "float")
    folded = state.folded
    after = sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert len(folded) == before - after > 0
    assert after == (1 if isinstance(network, Plain) else 0)  # one reads no convolution
    assert lost(model, exact) < 2e-6


@pytest.mark.parametrize("network", ["resnet", "mobilenet", "plain"], indirect=True)
def test_eight_bits_keep_the_network(network: Any) -> None:
    exact = logits(network, images().pixel_values)
    found, report = nybble.quantize(network, build_recipe("minmax-int", **INT8), images())
    assert found is network
    assert lost(found, exact) < 0.05  # mostly the inputs' rounding; means over images hide much of the weights'
    for row in report.layers:  # steps of max / 127: each of n weights is off by half of one at most
        assert row.error is not None and 0 < row.error < row.shape[-1] / (4 * 127**2), row
    convs = [name for name, module in quant_modules(found) if isinstance(module, QuantConv)]
    assert len(convs) == sum(".classifier" not in row.name and row.name != "net.head" for row in report.layers) > 1
    assert all(module.inputs is not None for _, module in quant_modules(found))


def test_batchnorms_of_a_network_are_folded_by_hand() -> None:
    network = networks()["plain"]
    x = images().pixel_values
    exact = network(x)
    assert fold_batchnorms(network, x) == {"stem.1": "stem.0", "wide.1": "wide.0"}
    assert lost(network, exact) < 2e-6


def test_a_norm_that_two_convolutions_feed_or_none_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert find_folds(network.eval(), lambda: network(torch.randn(1, 3, 4, 4))) == {"4": "3"}

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            found: Tensor = self.first(y) + self.second(y)
            return found

    twice = Twice().eval()
    assert find_folds(twice, lambda: twice(torch.randn(1, 3, 4, 4))) == {}


@pytest.mark.parametrize("name", ["gptq", "llm-fp4", "fp-baseline", "mse"])
def test_solvers_beat_min_max_on_convolutions(name: str) -> None:
    """Weights of four bits: less error at the output than min-max, by every method that looks at more than extremes."""
    exact = logits(networks()["plain"], images().pixel_values)
    errors = {}
    for method in ("minmax-fp", name):
        effort = "quick" if "fp" in name and method == name else "full"
        recipe = build_recipe(method, weights="e2m1 channel", activations="none", effort=effort)
        found, _ = nybble.quantize(networks()["plain"], recipe, images())
        errors[method] = lost(found, exact)
    assert errors[name] < errors["minmax-fp"]


def test_searched_inputs_of_a_network_beat_measured_ones() -> None:
    exact = logits(networks()["resnet"], images().pixel_values)
    errors = {}
    for method in ("minmax-fp", "fp-baseline"):
        effort = "quick" if method == "fp-baseline" else "full"
        recipe = build_recipe(method, weights="e2m3 channel", activations="e2m1 tensor static", effort=effort)
        found, _ = nybble.quantize(networks()["resnet"], recipe, images())
        errors[method] = lost(found, exact)
    assert errors["fp-baseline"] < errors["minmax-fp"]


def test_planes_are_measured_one_by_one() -> None:
    """An image's result doesn't depend on its batch, and a quiet channel has a grid of its own."""
    network, data = networks()["plain"], images(8)
    recipe = build_recipe("rtn", weights="none", activations="int4 plane symmetric=false")
    nybble.quantize(network, recipe, data)
    left = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == ["free"]  # images that are given are used, also where the recipe needs none
    together = network(data.pixel_values)
    alone = torch.cat([network(x[None]) for x in data.pixel_values])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    x = data.pixel_values * torch.tensor([1.0, 1e-3, 1e3]).view(1, 3, 1, 1)
    conv: Any = network.stem[0]
    rounded = conv.inputs(x)
    step = (x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True)) / 15
    assert ((rounded - x).abs() <= step).all()  # half a step, and half a step of the zero point at the ends
    assert all(len(plane.unique()) in range(8, 17) for plane in rounded.flatten(0, 1))


def pictures(tmp_path: Path) -> Path:
    place = tmp_path / "images.npy"
    np.save(place, np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    return place


@pytest.mark.parametrize("network", ["resnet", "mobilenet"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "inputs"), [(torch.float32, INT8["activations"]), (torch.bfloat16, "int8 plane symmetric=false")]
)
def test_folders_load_as_they_were_quantized(network: Any, dtype: torch.dtype, inputs: str, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    settings = nybble.Settings(samples=6, dtype=dtype)
    recipe = build_recipe("minmax-int", weights=INT8["weights"], activations=inputs)
    out, report = nybble.quantize(
        tmp_path / "float", recipe, str(pictures(tmp_path)), out=tmp_path / "out", settings=settings
    )
    ours, tokenizer = nybble.load(out)
    assert tokenizer is None
    wants = preparation_for(ours.config, {"size": {"height": 32, "width": 32}})
    x = image_samples(str(pictures(tmp_path)), wants, samples=None).pixel_values.to(dtype)
    there, _ = nybble.quantize(tmp_path / "float", recipe, str(pictures(tmp_path)), settings=settings)
    auto: Any = AutoModelForImageClassification
    theirs = auto.from_pretrained(out, dtype=dtype)
    assert torch.equal(logits(ours, x), logits(there, x))
    assert torch.equal(logits(theirs, x), logits(ours, x))
    assert torch.equal(classify(ours, x), logits(ours, x).argmax(-1))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert report.bits < 10  # scales of tiny kernels weigh much


@pytest.mark.parametrize("groups", [1, 4])
def test_rounding_does_not_shift_the_mean_of_a_channel(groups: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.eval().requires_grad_(False)
    x = torch.rand(8, 4, 10, 10) * 0.1 + 3  # a large mean, which rounded kernels no longer treat alike
    data = ImageSamples(pixel_values=x, labels=None, sha256="", available=8, source="random", note="")
    exact = network[0](x).mean((0, 2, 3))
    nybble.quantize(network, build_recipe("minmax-int", weights="int4 channel", activations="int4 tensor static"), data)
    conv: Any = network[0]
    shift = (conv(x).mean((0, 2, 3)) - exact).abs().max()
    assert shift < 0.02


def channel_means(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    means: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | QuantConv):
            module.register_forward_hook(lambda _m, _a, y, name=name: means.update({name: y.mean((0, 2, 3))}))
    network(x)
    return means


@pytest.mark.parametrize(("most", "tolerance"), [(1 << 23, 1e-5), (1, 0.01)], ids=["one batch", "as they come"])
def test_channels_keep_their_means_behind_other_quantized_layers(
    most: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bias, "MOST", most)
    network, data = networks()["plain"], images(8)
    exact = copy.deepcopy(network)
    fold_batchnorms(exact, data.pixel_values[:1])
    recipe = build_recipe("minmax-int", weights="int4 channel", activations="int4 tensor static")
    nybble.quantize(network, recipe, data, settings=nybble.Settings(batch=4))
    wanted, found = channel_means(exact, data.pixel_values), channel_means(network, data.pixel_values)
    assert wanted.keys() == found.keys() == {"stem.0", "wide.0"}
    for name, mean in wanted.items():
        torch.testing.assert_close(found[name], mean, rtol=0, atol=tolerance)


def test_what_convolutions_cannot_have_is_said() -> None:
    network = networks()["resnet"]
    for activations in ("int8 token", "int8 shifted static"):
        with pytest.raises(SchemeError, match="Write 'tensor', or 'plane'"):
            nybble.quantize(network, build_recipe("rtn", weights="int8 channel", activations=activations), images())
    with pytest.raises(GranularityError, match=r"resnet\.embedder\.embedder\.convolution.*147"):
        nybble.quantize(network, build_recipe("rtn", weights="int4 group=32", activations="none"), images())
    with pytest.raises(ModelError, match="with its head"):
        adapter_for(ResNetModel(network.config))
    with pytest.raises(UsageError, match="plain network"):
        nybble.save(nybble.quantize(Plain().eval(), build_recipe("minmax-int", **INT8), images())[0], "nowhere")
    assert not Path("nowhere").exists()


def test_a_config_cannot_make_timm_fetch_anything() -> None:
    for more in ({"architecture": "hf-hub:a/b"}, {"model_args": {"checkpoint_path": "x.pth"}}):
        with pytest.raises(FileError, match=r"architecture|model_args"):
            make_config({"model_type": "timm_wrapper", "architecture": "resnet18", **more}, "config.json")


@pytest.mark.skipif(not all(find_spec(n) for n in ("timm", "torchvision")), reason="timm needs a torchvision that fits")
@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_lite0", "tf_efficientnet_lite0"])
def test_timm_networks_through_transformers(tmp_path: Path, architecture: str) -> None:
    make_config: Any = transformers.TimmWrapperConfig
    config = make_config(architecture=architecture, num_labels=5)
    config.pretrained_cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    network: Any = transformers.TimmWrapperForImageClassification(config)
    network.eval().requires_grad_(False)
    network.save_pretrained(tmp_path / "float")
    settings = nybble.Settings(samples=6, dtype=torch.float32)
    data, out = str(pictures(tmp_path)), tmp_path / "out"
    nybble.quantize(tmp_path / "float", build_recipe("minmax-int", **INT8), data, out=out, settings=settings)
    ours, _ = nybble.load(out)
    x = image_samples(data, preparation_for(ours.config, {}), samples=None).pixel_values
    exact = logits(network, x)
    assert float((logits(ours, x) - exact).norm() / exact.norm()) < 0.1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())


def test_fisher_needs_a_matrix_product() -> None:
    scheme = {"rules": [{"targets": ["Conv"], "weights": "int8 channel", "inputs": "int8 tensor static"}]}
    recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": [{"solver": "llm-fp4", "loss": "fisher"}]})
    with pytest.raises(DataError, match="fisher"):
        nybble.quantize(networks()["resnet"], recipe, images())


def test_sizes_come_from_where_they_are_stated() -> None:
    config = ResNetConfig()
    with pytest.raises(DataError, match="crop_size"):
        preparation_for(config, {})
    for stated, size in (
        ({"crop_size": {"height": 20, "width": 24}}, (20, 24)), ({"size": {"shortest_edge": 16}}, (16, 16)),
        ({"size": 12}, (12, 12)),
    ):  # fmt: skip
        found = preparation_for(config, stated)
        assert (found.height, found.width) == size
    config.pretrained_cfg = {"input_size": [3, 8, 9], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    found = preparation_for(config, {})
    assert (found.height, found.width, found.mean) == (8, 9, (0.1, 0.2, 0.3))


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
@pytest.mark.parametrize("method", ["adaround", "lwc"])
def test_reconstruction_of_networks_of_transformers(name: str, method: str) -> None:
    """They give their outputs by name; the first is what is to be met."""
    network = networks()[name]
    recipe = shortened(build_recipe(method, weights="int4 channel", effort="quick"), 6)
    _, report = nybble.quantize(network, recipe, images())
    notes = {note for layer in report.layers for note in layer.notes}
    assert any("output error" in note for note in notes) or (method == "lwc" and any("went back" in n for n in notes))


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_solvers_alone_on_networks_of_transformers(name: str) -> None:
    """What comes out of their one block has names; no step behind the solver picks one."""
    lost = {}
    for solver in ("gptq", "rtn"):
        network = networks()[name]
        exact = logits(network, images().pixel_values)
        recipe = parse_recipe({"name": "x", "scheme": {"weights": "int4 channel"}, "steps": [{"solver": solver}]})
        found, _ = nybble.quantize(network, recipe, images())
        lost[solver] = float((logits(found, images().pixel_values) - exact).norm() / exact.norm())
    assert lost["gptq"] < lost["rtn"] < 1


def test_layers_whose_names_end_alike_are_told_apart() -> None:
    """Numbered layers inside of numbered layers, as in an EfficientNet of ``nn.Sequential`` alone."""
    inner = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)))
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    job = Job.make(as_model(net.eval()), None, build_recipe("gptq", weights="int8 channel"), images().pixel_values,
                   nybble.Settings(samples=6))  # fmt: skip
    assert job.load.products == {"0": 16 * 16, "1.0": 16 * 16, "1.1.1": 16 * 16, "4": 1}
    assert job.load.inputs == {"0": 3 * 32 * 32, "1.0": 4 * 16 * 16, "1.1.1": 8 * 16 * 16, "4": 4}


@pytest.mark.parametrize("target", ["w4a16", "w2a16"])
def test_the_best_recipe_of_a_target_takes_kernels_of_any_size(tmp_path: Path, target: str) -> None:
    """147 columns are two groups of 64 and one of 19; fewer than 64 are one group."""
    network, said = networks()["resnet"], list[str]()
    recipe = shortened(build_recipe("best", target=target, effort="quick"))
    _, report = nybble.quantize(network, recipe, images(), announce=said.append)
    cut = {row.shape[1]: (row.weights or "").split(maxsplit=1)[1] for row in report.layers}
    assert cut == {
        147: "group=64 pad=true symmetric=false",
        **{columns: f"group={min(columns, 64)} symmetric=false" for columns in cut if columns != 147},
    }
    assert any("end in a shorter one: embedder.embedder.convolution (147 columns)" in line for line in said)
    nybble.save(network, tmp_path / "out")
    ours, _ = nybble.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(ours, images().pixel_values), logits(network, images().pixel_values))


def test_learned_convolutions_still_know_their_norms(tmp_path: Path) -> None:
    """A folder's network is built with its norms; those that are in weights by now must go when it is loaded."""
    network, data = networks()["resnet"], images()
    network.save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    steps = [{"transform": "fold-batchnorm"}, {"reconstruction": "mse", "weights": "adaround", "steps": 2}]
    recipe = parse_recipe({"name": "x", "scheme": {"weights": "int8 channel"}, "steps": steps})
    settings = nybble.Settings(samples=6, dtype=torch.float32)
    nybble.quantize(tmp_path / "float", recipe, data, out=tmp_path / "out", settings=settings)
    ours, _ = nybble.load(tmp_path / "out")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    exact = logits(network, data.pixel_values)
    assert float((logits(ours, data.pixel_values) - exact).norm()) < 0.02 * float(exact.norm())
