"""What layers cost: bytes as they are packed, bits, bit operations, area."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.models.resnet.modeling_resnet import ResNetShortCut

from nybble.core.errors import NybbleError, UsageError
from nybble.costs import REGISTRY, Sized, latency, make_cost
from nybble.nn.kinds import targets_of
from nybble.presets import PRESETS
from nybble.quantizer import Quantizer
from nybble.search.groups import see


def by_bytes(layer: Any, x: torch.Tensor, calls: int) -> float:
    """A clock that runs by the bytes of a weight: a microsecond each."""
    return 1e-6 * float(sum(buffer.nbytes for buffer in layer.weight.buffers()))


SHAPES = [(8, 256), (6, 512), (5, 48), (3, 75), (7, 1)]
LINES = [*sorted(PRESETS), "int4 group=64 pad=true", "int3 channel", "int2 group=5 symmetric=false", "ternary tensor"]


@pytest.mark.parametrize("line", LINES)
def test_bytes_are_those_of_the_packed_weight(line: str) -> None:
    """Every tensor that a file gets, for every preset; shapes that a granularity can't cut are left to others."""
    quantizer, seen = Quantizer(line), 0
    for rows, columns in SHAPES:
        fitted, matrix = quantizer, torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        try:
            fitted = quantizer.fitted((rows, columns))
            packed = fitted.quantize(matrix.abs() if not quantizer.format.signed else matrix)
        except NybbleError:
            continue
        seen += 1
        held = sum(tensor.nbytes for tensor in packed.tensors().values())
        assert make_cost("bytes").of(Sized(name="w", shape=(rows, columns), matrices=3), fitted) == 3 * held
    assert seen


def test_bits_are_those_of_the_codes() -> None:
    layers = [Sized(name="a", shape=(10, 30)), Sized(name="b", shape=(7, 11), matrices=2)]
    bits, elements = make_cost("bits"), 300 + 154
    assert sum(bits.of(layer, Quantizer("int4 group=10 pad=true")) for layer in layers) == 4 * elements
    assert bits.limit(4.0, layers) == 4 * elements and bits.shown(4 * elements, layers) == 4.0
    assert bits.limit(3.1, layers) == math.floor(3.1 * elements)
    hundred = [Sized(name="c", shape=(10, 10))]
    assert bits.limit(2.3, hundred) == 230  # 2.3 * 100 is 229.99999999999997


def test_bit_operations_and_area_go_with_both_operands() -> None:
    plain = Sized(name="a", shape=(4, 4), macs=1000)
    eight = Sized(name="a", shape=(4, 4), macs=1000, inputs=Quantizer("int8 token"))
    bops, mac = make_cost("bops"), make_cost("mac")
    assert bops.of(plain, Quantizer("int4")) == 1000 * 4 * 16
    assert bops.of(eight, Quantizer("int8")) == 4 * bops.of(
        Sized(name="a", shape=(4, 4), macs=1000, inputs=Quantizer("int4 token")), Quantizer("int4")
    )
    assert mac.of(eight, Quantizer("int4")) == mac.of(plain, Quantizer("int4")) < mac.of(eight, Quantizer("int8"))


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_cost_is_whole_and_grows_with_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "seconds", by_bytes)
    cost, layer = make_cost(name), Sized(name="a", shape=(128, 64), macs=128 * 64 * 3)
    found = [cost.of(layer, Quantizer(f"int{bits} group=32")) for bits in (2, 3, 4, 8)]
    assert all(isinstance(each, int) for each in found) and found == sorted(found)
    assert len(set(found)) == (3 if name == "cycles" else 4)  # whose multipliers have 2, 4 and 8 bits
    assert cost.limit(cost.shown(found[2], [layer]), [layer]) == found[2]


CLASSES = {"num_labels": 1000}


def resnet(**config: Any) -> Any:
    made: Any = transformers.ResNetConfig
    return transformers.ResNetForImageClassification(made(**config, **CLASSES))


def resnet18() -> Any:
    """With a projection in the first stage's shortcut, as the published count has it: 12.8 million MACs more."""
    made = resnet(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    projection: Any = ResNetShortCut
    made.resnet.encoder.stages[0].layers[0].shortcut = projection(64, 64, stride=1)
    return made


def mobilenetv2() -> Any:
    made: Any = transformers.MobileNetV2Config
    return transformers.MobileNetV2ForImageClassification(made(**CLASSES))


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[float, float, float]]] = {
    "resnet18": (resnet18, (29.23, 116.9, 467.7)),
    "resnet50": (resnet, (65.4, 261.7, 1047)),
    "mobilenetv2": (mobilenetv2, (4.81, 19.3, 77)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_bit_operations_are_the_published_ones(name: str) -> None:
    """GBOPs at 224 px in 4, 8 and 16 bits on both sides: FLIQS (Dotzel et al. 2023), points of figures, to 0.5 %."""
    make, published = NETWORKS[name]
    with torch.device("meta"):
        model, image = make().eval(), torch.empty(1, 3, 224, 224)
    targets = [*targets_of(model).values()]
    seen = see(model, targets, lambda: model(pixel_values=image))
    for bits, wanted in zip(("int4", "int8", "bf16"), published, strict=True):
        line = Quantizer(bits)
        sizes = [Sized(name=t.name, shape=t.shape, macs=seen.macs[t.name], inputs=line) for t in targets]
        found = sum(make_cost("bops").of(size, line) for size in sizes)
        assert found / 1e9 == pytest.approx(wanted, rel=5e-3)


def test_an_unknown_cost() -> None:
    with pytest.raises(UsageError, match=r"unknown cost 'byte'.*bytes"):
        make_cost("byte")
