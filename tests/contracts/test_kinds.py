"""Every kind of module: one kind claims a module, its matrix is what torch multiplies by, its file brings it back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, LlamaConfig, MixtralConfig
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from nybble.calibration.groups import trace_groups
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.core.errors import FileError, ModelError, SchemeError, UsageError
from nybble.learned import ACTIVATIONS, make_part
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import (
    REGISTRY,
    Kind,
    LayerKind,
    Quantized,
    Stored,
    Target,
    _lookup,
    all_kinds,
    describe,
    kind_of,
    kind_of_entry,
    kind_of_quantized,
    matrix_at,
    restore,
    targets_of,
    values_at,
)
from nybble.nn.layouts import Layouts
from nybble.nn.query_key import QueryKey
from nybble.nn.rotation import BlockRotation, mark_rotated
from nybble.nn.twin import Twin
from nybble.quantizer import Quantizer
from nybble.scheme import parse_scheme


def experts(config: Any, cls: Any) -> nn.Module:
    made: Any = config(hidden_size=8, intermediate_size=6, num_local_experts=3)
    made._experts_implementation = "eager"
    module: nn.Module = cls(made)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def attention() -> nn.Module:
    make: Any = LlamaConfig
    attend: Any = LlamaAttention
    config = make(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    module: nn.Module = attend(config, layer_idx=0)
    return module


SAMPLES: dict[str, list[Callable[[], nn.Module]]] = {
    "linear": [
        lambda: nn.Linear(8, 6), lambda: nn.Linear(8, 6, bias=False), lambda: conv1d(6, 8),
        lambda: made(FalconLinear, 8, 6), lambda: Named(8, 6),
    ],
    "conv": [
        lambda: nn.Conv2d(8, 6, 3, padding=1), lambda: nn.Conv2d(8, 6, 3, groups=2, stride=2, bias=False),
        lambda: nn.Conv1d(8, 6, 3, dilation=2),
        lambda: made(EfficientNetDepthwiseConv2d, 8, padding="valid"),
    ],
    "embedding": [lambda: nn.Embedding(10, 8, padding_idx=0)],
    "experts": [lambda: experts(MixtralConfig, MixtralExperts), lambda: experts(GptOssConfig, GptOssExperts)],
    "attention": [attention],
    "query-key": [lambda: QueryKey(torch.randn(16, 8), torch.randn(16), "q_proj", "k_proj")],
    "rotated-linear": [lambda: rotated(nn.Linear(8, 6)), lambda: rotated(conv1d(6, 8))],
    "tied": [],
}  # fmt: skip
CASES = [(name, make) for name, makes in SAMPLES.items() for make in makes]
LINE = Quantizer("int8 channel")


class Named(nn.Linear):
    """A child that computes what its parent does."""

    def extra_repr(self) -> str:
        return "named"


class Cosine(nn.Linear):
    """A head that measures angles."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(input), nn.functional.normalize(self.weight), self.bias)


def made(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    module: nn.Module = cls(*args, **kwargs)
    return module


def rotated(module: nn.Module) -> nn.Module:
    mark_rotated(module, BlockRotation(4, torch.tensor([1, -1, -1, 1], dtype=torch.int8)))
    return module


def conv1d(rows: int, columns: int) -> nn.Module:
    make: Any = Conv1D
    module: nn.Module = make(rows, columns)
    return module


def inputs(module: nn.Module) -> Tensor:
    shapes: dict[type[nn.Module], tuple[int, ...]] = {nn.Conv2d: (2, 8, 5, 4), nn.Conv1d: (2, 8, 7)}
    shape = next((shapes[cls] for cls in type(module).__mro__ if cls in shapes), (3, 5, 8))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """What a module of this kind says to fixed inputs; ``x``: those of layers."""
    with torch.no_grad():
        if name == "experts":
            index, gates = torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.full((3, 2), 0.5)
            found: Tensor = module(x[0, :3], index, gates)
        else:
            found = module(torch.arange(10) if name == "embedding" else x)
    return found


def test_every_kind_has_samples() -> None:
    assert set(REGISTRY.names()) == set(SAMPLES)
    assert len({kind.entry for kind in all_kinds()}) == len(all_kinds()) == len(SAMPLES)
    assert [REGISTRY.get(name).entry for name in SAMPLES] == [n if n != "attention" else "matmuls" for n in SAMPLES]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_one_kind_claims_a_module(name: str, make: Callable[[], nn.Module]) -> None:
    module = make()
    assert [kind for kind in all_kinds() if kind.claims(module)] == [REGISTRY.get(name)] == [kind_of(module)]
    for other in (nn.ReLU(), nn.LayerNorm(4), nn.Conv3d(2, 2, 1), nn.EmbeddingBag(4, 8), nn.Sequential(module)):
        assert kind_of(other) is None


@pytest.mark.parametrize(("name", "make"), CASES)
def test_parameters_and_matrices_are_inverse(name: str, make: Callable[[], nn.Module]) -> None:
    root = nn.ModuleDict({"m": make()})
    for target in targets_of(root).values():
        if not target.matrices:
            with pytest.raises(ModelError, match="no matmul weight called 'm'"):
                matrix_at(root, "m")
            continue
        matrix = matrix_at(root, target.name)
        assert (
            matrix.shape[-2:] == target.shape
            and matrix.numel() == target.matrices * target.shape[0] * (target.shape[1])
        )
        values = values_at(root, target.name, 2 * matrix)
        assert tuple(values) == target.parameters
        for full, value in values.items():
            assert torch.equal(value, 2 * root.get_parameter(full))
        given = {full: root.get_parameter(full).double() for full in target.parameters}
        assert torch.equal(matrix_at(root, target.name, given.__getitem__), matrix.double())


def test_what_no_kind_claims_is_taken_as_it_is() -> None:
    root = nn.ModuleDict({"router": nn.LayerNorm(4)})
    assert matrix_at(root, "router") is root["router"].weight
    assert list(values_at(root, "router", torch.ones(4))) == ["router.weight"]
    for name in ("nothing", "router.weight"):
        with pytest.raises(ModelError, match="no matmul weight called"):
            matrix_at(root, name)


@pytest.mark.parametrize("make", [*SAMPLES["linear"], *SAMPLES["conv"]])
def test_rows_times_matrix_is_the_layer(make: Callable[[], nn.Module]) -> None:
    """Against torch's own product."""
    module: Any = make()
    kind, x = kind_of(module), inputs(module)
    assert kind is not None and kind.shares_input
    (target,) = kind.targets("m", module)
    with torch.no_grad():
        y = module(x)
        rows, matrix = kind.rows(module, kind.reads((x,), {})), matrix_at(nn.ModuleDict({"m": module}), "m")
        if kind.by_rows:
            expected = y
        else:  # [images, channels, places] -> [groups, images * places, channels of the group]
            flat = y.flatten(2).view(len(x), target.groups, -1, y.flatten(2).shape[-1])
            expected = flat.permute(1, 0, 3, 2).flatten(1, 2)
            rows = rows if target.groups > 1 else rows[None]
            matrix = matrix.view(target.groups, -1, matrix.shape[1])
        bias = torch.zeros(target.shape[0]) if module.bias is None else module.bias
        bias = bias if kind.by_rows else bias.view(target.groups, 1, -1)
        torch.testing.assert_close(rows @ matrix.mT + bias, expected, rtol=1e-5, atol=1e-5)
        one = y[:1] if kind.channels_first else y
        assert kind.products(module, one) == expected.numel() * (1 if kind.by_rows else target.groups) // (
            target.shape[0] * (1 if kind.by_rows else len(x))
        )


def test_two_ways_to_cut_an_input_are_told_apart() -> None:
    kind = REGISTRY.get("conv")
    same, other = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=0)
    assert kind.cut(same) == kind.cut(nn.Conv2d(8, 2, 3, padding=1)) != kind.cut(other)


@pytest.mark.parametrize("make", SAMPLES["experts"])
def test_experts_read_what_is_routed_to_them(make: Callable[[], nn.Module]) -> None:
    """Against the module's own sum over experts, with the last product done here."""
    module: Any = make()
    kind, index = kind_of(module), torch.tensor([[0, 2], [2, 1], [0, 2], [2, 0]])
    assert kind is not None and kind.fused
    hidden, gates = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), torch.rand(4, 2)
    rebuilt = torch.zeros(4, 8)
    root = nn.ModuleDict({"m": module})
    with torch.no_grad():
        seen = dict(kind.routed(module, "gate_up_proj", (hidden, index, gates), {}))
        for expert, rows in kind.routed(module, "down_proj", (hidden,), {"index": index, "gates": gates}):
            tokens, slot = torch.where(index == expert)
            assert torch.equal(seen[expert], hidden[tokens])
            y = rows @ matrix_at(root, "m.down_proj")[expert].T
            y = y + module.down_proj_bias[expert] if hasattr(module, "down_proj_bias") else y
            rebuilt.index_add_(0, tokens, y * gates[tokens, slot][:, None])
        torch.testing.assert_close(rebuilt, module(hidden, index, gates), rtol=1e-5, atol=1e-5)
    assert list(seen) == [0, 1, 2]


def own(root: nn.Module, kind: Kind | None) -> list[Target]:
    """Targets of the kind of the module under test: an attention has linear layers inside."""
    return [target for target in targets_of(root).values() if target.kind is kind]


def made_for(target: Target, root: nn.Module) -> Quantized:
    """Eight bits, and static inputs where the kind takes them."""
    static = ActivationQuantizer(Quantizer("int8 tensor static"), Quantizer("int8 tensor").fit(torch.ones(4)))
    if not target.matrices:
        return Quantized(operands={name: copy.deepcopy(static) for name in target.kind.operands})
    matrix = matrix_at(root, target.name).detach()
    weights = [LINE.quantize(m.contiguous()) for m in (matrix if target.kind.fused else matrix[None])]
    both = "inputs" in target.kind.sides
    return Quantized(weights=weights, inputs=static if both else None)


LEARNED: dict[str, dict[str, str]] = {
    "attention": {"matmuls": "int4 tensor static"},
    "embedding": {"weights": "int4 channel"},
    "experts": {"weights": "int4 channel"},
}


@pytest.mark.parametrize(("name", "make"), CASES)
def test_what_trains_in_its_place_settles_to_the_stand_in(name: str, make: Callable[[], nn.Module]) -> None:
    """Of every kind, also of another package: sites, twins with their state, and bit for bit the quantized module."""
    torch.manual_seed(0)
    root = nn.ModuleDict({"m": make()})
    rule = parse_scheme(LEARNED.get(name, {"weights": "int4 channel", "inputs": "int8 tensor static"})).rules[0]
    targets = [replace(target, rule=rule) for target in own(root, REGISTRY.get(name))]
    twins, given, before = list[Twin](), inputs(root["m"]), copy.deepcopy(root)
    for target in targets:
        sites = [*target.kind.sites(target, root["m"])]
        assert {site.role for site in sites} == {key for key in ("weights", "inputs", "matmuls") if getattr(rule, key)}
        learned = {}
        for site in sites:
            x = torch.linspace(-3, 3, 64).view(1, 1, 8, 8) if site.side == ACTIVATIONS else site.example
            learned[site.name] = make_part("lsq", {}).make(site.quantizer, x, side=site.side)
        twins += target.kind.put_twin(root, target, learned)
    assert twins and [m for m in root.modules() if isinstance(m, Twin)] == twins
    for path, twin in [(path, m) for path, m in root.named_modules() if isinstance(m, Twin)]:
        values = {f"{path}.{key}".removesuffix("."): value for key, value in twin.float_values().items()}
        for full, value in values.items():
            torch.testing.assert_close(value, before.get_parameter(full).detach())
        assert name == "attention" or not values.keys().isdisjoint((path, f"{path}.weight"))
    for parameter in root.parameters():
        assert parameter.dtype == torch.float32
    with torch.no_grad():
        for twin in twins:
            for key, parameters in twin.groups().items():
                assert parameters, key
                for parameter in parameters:
                    parameter.mul_(1.1)  # as training might
    expected = ran(name, root.eval(), given)
    for path, twin in [(path, m) for path, m in root.named_modules() if isinstance(m, Twin)]:
        twin.settle_in(root, path)
    assert not any(isinstance(module, Twin) for module in root.modules())
    assert any(kind_of_quantized(module) is REGISTRY.get(name) for module in root.modules())
    assert torch.equal(ran(name, root, given), expected)


def test_a_kind_without_twins_says_so() -> None:
    kind, module = REGISTRY.get("conv"), nn.Conv2d(8, 6, 3)
    with pytest.raises(
        SchemeError, match=r"'conv', whose quantization can't be trained yet. Ignore it \(Conv2d, Conv\)"
    ):
        Kind.sites(kind, next(kind.targets("m", module)), module)


def ran(name: str, root: nn.ModuleDict, x: Tensor) -> Tensor:
    """What the module says; of an attention what its operands become, as it needs a model around it."""
    if name != "attention":
        return run(name, root["m"], x)
    part: Any = root["m"].get_submodule("matmuls")
    x = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.stack([part(operand, x) for operand in ("query", "key", "probabilities", "value")])


@pytest.mark.parametrize(("name", "make"), CASES)
def test_described_and_restored(name: str, make: Callable[[], nn.Module]) -> None:
    """The stand-in rounds each weight once, and its description and tensors rebuild it bit for bit."""
    torch.manual_seed(0)
    root = nn.ModuleDict({"m": make()})
    fresh, rounded = copy.deepcopy(root), copy.deepcopy(root)
    targets = own(root, REGISTRY.get(name))
    x, made = inputs(root["m"]), [made_for(target, root) for target in targets]
    for target in targets:
        if target.matrices:
            matrix = matrix_at(root, target.name).detach()
            values = values_at(
                root, target.name, LINE.fake_quantize(matrix.reshape(-1, matrix.shape[-1])).view_as(matrix)
            )
            for full, value in values.items():
                rounded.get_parameter(full).data = value
    for target, parts in zip(targets, made, strict=True):
        target.kind.put(root, target, parts)
    layouts, stored = Layouts(), Stored()
    found = {n: describe(m, layouts) for n, m in root.named_modules() if kind_of_quantized(m) is not None}
    assert all(entry["class"] == REGISTRY.get(name).entry for entry in found.values())
    entries, numbered = json.loads(json.dumps([found, layouts.entries]))
    with torch.device("meta"):
        weights = [Layouts(numbered).empty(number) for number in range(len(numbered))]
        for full, entry in entries.items():
            kind_of_entry(full, entry).stored(full, entry, weights, stored)
            restore(fresh, full, entry, Layouts(numbered))
    state = root.state_dict()
    for full, (dtype, shape) in stored.tensors.items():
        assert (state[full].dtype, list(state[full].shape)) == (dtype, shape)
    left = set(state) - set(stored.tensors)
    assert all("bias" in n or (name == "attention" and n.endswith("proj.weight")) for n in left)
    assert set(stored.roles.values()) <= {
        "codes",
        "scales",
        "offsets",
        *(["tables"] if name == "rotated-linear" else []),
    }
    assert sum(stored.elements.values()) == sum(t.matrices * t.shape[0] * t.shape[1] for t in targets)
    assert list(fresh.state_dict()) == list(state)
    fresh.load_state_dict(state, assign=True)
    if name != "attention":
        assert torch.equal(run(name, fresh["m"], x), run(name, root["m"], x))
        if name in ("embedding", "experts"):  # no inputs to round: the float module with rounded weights
            assert torch.equal(run(name, fresh["m"], x), run(name, rounded["m"], x))


def test_entries_are_those_of_the_first_files() -> None:
    """Written out as version 1 of the format had them: files keep them for ever."""

    def entry(module: nn.Module, folded: str = "") -> Any:
        root, layouts = nn.ModuleDict({"m": module}), Layouts()
        target = own(root, kind_of(module))[0]
        made = made_for(target, root)
        target.kind.put(root, target, Quantized(**{**vars(made), "folded": folded}))
        found = {n: describe(m, layouts) for n, m in root.named_modules() if kind_of_quantized(m) is not None}
        return next(iter(found.items()))

    inputs = {"quantizer": "int8 static", "static": ["scale"]}
    assert entry(nn.Linear(8, 6)) == ("m", {"class": "linear", "weight": 0, "inputs": inputs})
    turned = {"class": "rotated-linear", "rotation": {"block": 4, "signs": True}, "weight": 0, "inputs": inputs}
    assert entry(rotated(nn.Linear(8, 6))) == ("m", turned)
    bare = {"class": "conv", "bias": False, "weight": 0, "inputs": inputs}
    assert entry(nn.Conv2d(8, 6, 3, bias=False)) == ("m", bare)
    folded = {"class": "conv", "bias": True, "folded": "a.norm", "weight": 0, "inputs": inputs}
    found = entry(nn.Conv2d(8, 6, 3), "a.norm")
    assert found == ("m", folded) and list(found[1]) == list(folded)  # bytes of config.json: the order too
    assert entry(nn.Embedding(4, 8)) == ("m", {"class": "embedding", "weight": 0, "dtype": "float32"})
    name, several = entry(experts(GptOssConfig, GptOssExperts))
    assert (name, several) == ("m.gate_up_proj", {"class": "experts", "weights": [0, 0, 0], "transposed": True})
    operands = {"query": inputs, "key": inputs, "probabilities": inputs, "value": inputs}
    assert entry(attention()) == ("m.matmuls", {"class": "matmuls", "operands": operands})


@pytest.mark.parametrize(
    ("make", "rule", "message"),
    [
        (SAMPLES["linear"][0], {"matmuls": "int8 tensor"}, "is a layer with a weight"),
        (SAMPLES["conv"][0], {"inputs": "int8 channel"}, "one value meets many kernel positions"),
        (SAMPLES["embedding"][0], {"weights": "int8", "outputs": "int8"}, "its rule has weights only"),
        (SAMPLES["experts"][0], {"weights": "int8", "inputs": "int8"}, "fused experts take quantized weights only"),
        (attention, {"weights": "int8"}, "products of activations only"),
        (attention, {"matmuls": "int8 shifted static"}, "shifted columns need a weight"),
        (attention, {"matmuls": "int8 token static"}, "static activations have one float32 scale"),
        (SAMPLES["linear"][0], {"inputs": "int8 group=3"}, "activations: "),
    ],
)
def test_sides_that_a_kind_cannot_take(make: Callable[[], nn.Module], rule: Mapping[str, str], message: str) -> None:
    module = make()
    target = own(nn.ModuleDict({"m": module}), kind_of(module))[0]
    planned = replace(target, rule=parse_scheme({**rule}).rules[0])
    with pytest.raises(UsageError, match=message):
        planned.kind.check(planned, module)
    if planned.kind.shares_input:
        with pytest.raises(SchemeError, match="tied to the embeddings"):
            planned.kind.tied(planned, nn.ModuleDict({"m": module, "other": nn.Embedding(4, 8)}), ["other.weight"])
        with pytest.raises(SchemeError, match=r"is that of other too.*ignore 're:\(m\|other\)'"):
            planned.kind.tied(planned, nn.ModuleDict({"m": module, "other": module}), ["other.weight"])


def test_products_of_an_attention_are_those_of_its_heads() -> None:
    """Queries that share a key are neighbours; probabilities meet the transposed values."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": (2, 4, 5, 8), "key": (2, 2, 6, 8), "probabilities": (2, 4, 5, 6), "value": (2, 2, 6, 3)}
    seen = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    (first, second) = REGISTRY.get("attention").pairs(seen)
    assert [name for name, _ in (*first, *second)] == ["query", "key", "probabilities", "value"]
    scores, outputs = (left @ right.mT for (_, left), (_, right) in (first, second))
    for product in range(8):
        sample, head = divmod(product, 4)
        wanted = seen["query"][sample, head] @ seen["key"][sample, head // 2].T
        torch.testing.assert_close(scores[product], wanted)
        wanted = seen["probabilities"][sample, head] @ seen["value"][sample, head // 2]
        torch.testing.assert_close(outputs[product], wanted)


def test_descriptions_that_contradict_the_model() -> None:
    def put(module: nn.Module, entry: Any, name: str = "m", layouts: list[Any] | None = None) -> None:
        restore(nn.ModuleDict({"m": module}), name, entry, Layouts(layouts))

    layouts = Layouts()
    layouts.number(LINE.quantize(torch.ones(6, 4)))
    with pytest.raises(FileError, match="m is described as a linear; in this model it is a Conv2d"):
        put(nn.Conv2d(8, 6, 3), {"class": "linear"})
    with pytest.raises(FileError, match="m is described as a conv; in this model it is a ReLU"):
        put(nn.ReLU(), {"class": "conv", "bias": True})
    with pytest.raises(FileError, match=r"m is described as \[6, 4\]; this model has \[6, 8\]"):
        put(nn.Linear(8, 6), {"class": "linear", "weight": 0}, layouts=layouts.entries)
    with pytest.raises(ModelError, match="m is a Embedding, not a plain embedding of shape"):
        put(nn.Embedding(10, 8), {"class": "embedding", "weight": 0, "dtype": "float32"}, layouts=layouts.entries)
    with pytest.raises(ModelError, match=r"n\.down_proj, which this model does not have"):
        put(experts(MixtralConfig, MixtralExperts), {"class": "experts", "weights": []}, "n.down_proj")
    with pytest.raises(FileError, match="matmuls, which has another name"):
        put(attention(), {"class": "matmuls", "operands": {}}, "m.products")
    with pytest.raises(ModelError, match="m is tied to the input embedding, which is not quantized"):
        put(nn.Linear(8, 6), {"class": "tied"})
    for table in ("n", 3):
        with pytest.raises(ModelError, match=f"quantizes {table}, which this model does not have"):
            put(nn.Linear(8, 6), {"class": "tied", "table": table})
    with pytest.raises(ModelError, match="no quantized module"):
        describe(nn.Linear(2, 2), layouts)


class Second(nn.Module):
    """Multiplies its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.bias = None

    def forward(self, gate: Tensor, x: Tensor) -> Tensor:
        y: Tensor = gate * (x @ self.weight.T)
        return y


class SecondKind(LayerKind):
    entry = "second"
    classes = ("Linear",)

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, Second)

    def reads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        found: Tensor = args[1]
        return found

    def matrix(self, module: nn.Module, leaf: str, get: Callable[[str], Tensor]) -> Tensor:
        return get("weight")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:
        return {"weight": matrix}

    def stand_in(self, old: nn.Module, weight: Any, bias: Tensor | None, made: Quantized) -> Any:
        raise NotImplementedError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(4, 4), Second(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = x + 1
        y: Tensor = self.one(x) + self.two(gate, x) + self.other(gate)
        return y


def test_a_kind_says_which_argument_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: tuple[Kind, ...] = (SecondKind(), *all_kinds())
    monkeypatch.setattr(_lookup, "all_kinds", lambda: kinds)
    hidden = torch.randn(2, 3, 4)
    call = BlockCall(index=0, args=(), kwargs={}, keyword=None, start={HIDDEN: hidden})
    assert trace_groups(Block(), call).groups == (("one", "two"), ("other",))
