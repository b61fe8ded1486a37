"""Integer networks of ResNets with both shortcuts and MobileNetV2: runs are the simulation, without a float."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import nybble
from nybble.core.errors import DataError, ModelError, SchemeError
from nybble.nn.integer.convert import integer_network
from nybble.nn.integer.dtypes import operations
from nybble.nn.integer.network import IntegerNetwork
from nybble.nn.kinds import quant_modules
from nybble.qtensor import dense

BASIC, BOTTLENECK = "basic", "bottleneck"
W8A8 = ("int8 channel", "uint8 symmetric=false static")
SIGNED = ("int8 channel", "int8 static")
W4A4 = ("int4 channel", "uint4 symmetric=false static")
KINDS = (BASIC, BOTTLENECK, "mobilenet")


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def floats(kind: str) -> Any:
    """With BatchNorms that do something; one channel has next to no weights behind its own."""
    config: Any
    torch.manual_seed(3)
    if kind == "mobilenet":
        config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=10)  # type: ignore[call-arg]
        model: Any = transformers.MobileNetV2ForImageClassification(config)
    else:
        sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 10}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type=kind, **sizes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, (low, high) in {
                "running_mean": (-0.2, 0.2),
                "running_var": (0.5, 2),
                "weight": (0.5, 2),
                "bias": (-0.3, 0.3),
            }.items():
                getattr(module, name).data.uniform_(low, high)
            module.weight.data[1] = 1e-13
    return model.eval()


def scheme(lines: tuple[str, str]) -> dict[str, Any]:
    both = {"weights": lines[0], "inputs": lines[1]}
    return {"rules": [{"targets": ["re:.*classifier.*"], **both}, {"targets": ["Linear"], **both}], "ignore": []}


@cache
def made(kind: str, lines: tuple[str, str] = W8A8) -> tuple[Any, Any]:
    """The float model and the quantized one."""
    steps = [{"transform": "fold-batchnorm"}, {"solver": "rtn", "scale": "absmax"}]
    recipe = {"name": "ours", "scheme": scheme(lines), "steps": steps}
    return floats(kind), nybble.quantize(floats(kind), recipe, data=images())[0]


def network(kind: str, lines: tuple[str, str] = W8A8, **options: Any) -> IntegerNetwork:
    return integer_network(made(kind, lines)[1], images(2), **options)


@pytest.mark.parametrize("ties", ["half-up", "half-even"])
@pytest.mark.parametrize(
    ("kind", "lines"), [*((k, W8A8) for k in KINDS), (BASIC, SIGNED), (BASIC, W4A4), ("mobilenet", W4A4)]
)
def test_a_run_in_integers_is_the_simulation_in_floats(kind: str, lines: tuple[str, str], ties: Any) -> None:
    net = network(kind, lines, ties=ties)
    q = net.entrance.codes(images(4, seed=1))
    runs, simulated = net.codes(q), net.codes(q.double())
    count = 0
    for (name, ours), (_, theirs) in zip(runs, simulated, strict=True):
        assert not ours.is_floating_point() and theirs.dtype == torch.float64
        assert torch.equal(ours.double(), theirs), name
        count += len(set(ours.flatten().tolist())) > 5
    assert count > 20


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_between_input_and_logits_is_a_float(kind: str) -> None:
    found = operations(network(kind), images(2))
    assert [op for op in found if not op.integer] == []
    types = {dtype for op in found for dtype in op.outputs}
    assert types <= {torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64} and len(found) > 100


def test_the_trace_sees_a_float() -> None:
    net = network(BASIC)
    net.steps[3].forward = lambda q: (q * 1.0).to(q.dtype)
    assert {op.name for op in operations(net, images(2)) if not op.integer} >= {"aten.mul.Tensor"}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_those_of_the_float_network(kind: str) -> None:
    model, _ = made(kind)
    x = images(8, seed=2)
    with torch.no_grad():
        wanted = model(x).logits
    got = network(kind)(x)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() / wanted.norm() < 0.03  # 0.01 measured


def test_float_residuals_are_not_what_integers_come_to() -> None:
    """The quantized model adds in float: the same codes at first, others behind its sums."""
    _, model = made(BASIC)
    net, x = network(BASIC), images(4, seed=4)
    grids: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: Any, args: Any) -> None:
            params = layer.inputs.params()
            zero = 0 if params.zero_point is None else int(dense(params.zero_point))
            low, high = -zero, 255 - zero
            grids[f"{name}.inputs"] = torch.round(args[0] / params.scale).clamp(low, high)

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in dict(quant_modules(model)).items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    differ = {
        name: float((q != grids[name]).double().mean()) for name, q in net.codes(net.entrance.codes(x)) if name in grids
    }
    names = list(differ)
    assert differ[names[0]] < 0.005  # behind one convolution: biases are rounded too, and float32 has ties of its own
    assert max(differ.values()) > 0.2 and len(names) > 8


def test_identities_are_rounded_once_and_each_branch_by_itself() -> None:
    net = network(BASIC)
    sums = [at for at, name in enumerate(net.names) if name.startswith("sum")]
    assert len(sums) == 4
    read = [{net.names[i - 1].rsplit(".", 1)[-1] for i in net.reads[at]} for at in sums]
    assert all("convolution" in names for names in read)
    assert sum("inputs" in names for names in read) == 3  # identities; the other has a convolution there
    q = net.entrance.codes(images(2))
    known = dict(enumerate([q, *(y for _, y in net.codes(q))]))
    for at in sums:
        step: Any = net.steps[at]
        x, y = (known[i].double() for i in net.reads[at])
        ratios = [part.mantissa.double() * 2.0 ** -part.exponent.double() for part in (step.first, step.second)]
        terms = [t * r.view(1, -1, 1, 1) for t, r in zip((x, y), ratios, strict=True)]
        apart = torch.floor(terms[0] + 0.5) + torch.floor(terms[1] + 0.5)
        assert torch.equal(known[at + 1].double(), apart)
        assert not torch.equal(torch.floor(terms[0] + terms[1] + 0.5), apart)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("int8 channel", "int8 token"), "one calibrated scale"),
        (("int8 channel symmetric=false", "int8 static"), "one scale a row"),
        (("float8_e4m3fn channel", "int8 static"), "not integers of up to 8 bits"),
    ],
)
def test_what_has_no_integer_form_is_refused(lines: tuple[str, str], words: str) -> None:
    if "token" in lines[1]:
        layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        model, _ = nybble.quantize(layer, scheme_of(lines), data=torch.randn(8, 8))
        x = torch.randn(2, 8)
    else:
        model, x = made(BASIC, lines)[1], images(2)
    with pytest.raises(SchemeError, match=words):
        integer_network(model, x)


def scheme_of(lines: tuple[str, str]) -> dict[str, Any]:
    return {
        "name": "ours",
        "scheme": {"weights": lines[0], "inputs": lines[1], "ignore": []},
        "steps": [{"solver": "rtn"}],
    }


def test_networks_that_do_something_else_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.tanh(self.first(x)))
            return y

    model, _ = nybble.quantize(Odd(), scheme_of(SIGNED), data=torch.randn(8, 8))
    with pytest.raises(ModelError, match="can't follow tanh"):
        integer_network(model, torch.randn(2, 8))
    with pytest.raises(ModelError, match=r"can't follow (t|addmm|mm|linear)\b"):
        integer_network(Odd(), torch.randn(2, 8))
    with pytest.raises(DataError, match="NaN or infinite"):
        network(BASIC)(images(2) * float("nan"))


def test_sums_that_could_overflow_are_refused() -> None:
    layer = nn.Linear(140_000, 2)
    layer.weight.data.fill_(1)
    found, _ = nybble.quantize(nn.Sequential(layer), scheme_of(SIGNED), data=torch.ones(2, 140_000))
    with pytest.raises(SchemeError, match=r"can reach 2,2.*beyond 32-bit"):
        integer_network(found, torch.ones(2, 140_000))
