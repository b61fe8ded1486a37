"""Units of a block: residual blocks where there are some, layers elsewhere; what follows what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parts.models.test_cnns import networks
from torch import Tensor, nn
from torch.nn import functional

from nybble.calibration.units import Unit, find_units
from nybble.models.adapter import adapter_for
from nybble.nn.kinds import kind_of


def units(block: nn.Module, by: str = "block", x: Tensor | None = None, net: nn.Module | None = None) -> list[Unit]:
    x = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)) if x is None else x
    layers = {name: name for name, module in block.named_modules() if kind_of(module) is not None}
    return find_units(block.eval(), layers, lambda: (net or block)(x), [x], by)


def names(found: list[Unit]) -> list[str]:
    return [unit.name for unit in found]


def conv(into: int = 4, out: int = 4, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, 3, padding=1, **options), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class InPlace(nn.Module):
    """As torchvision's basic block: one ReLU called twice, the sum written over what the second norm gave."""

    def __init__(self, skip: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.na, self.nb, self.relu, self.skip = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(self.relu(self.na(self.a(x)))))
        if self.skip:
            y += x
        found: Tensor = self.relu(y)
        return found


class Squeezed(nn.Module):
    """Expand, scale channels by what a small network of them says, project: a residual block with one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.squeeze, self.project = conv(4, 8), Squeeze(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.project(self.squeeze(self.expand(x)))
        return found


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x * gate


class Glued(nn.Module):
    """Functions between its modules, and a head behind a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(4, 4, 1), nn.Sequential(InPlace(), InPlace(skip=False), Squeezed())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(functional.relu(self.stem(x)))
        found: Tensor = self.head(torch.flatten(functional.adaptive_avg_pool2d(y, 1), 1))
        return found


class Branches(nn.Module):
    """Two branches side by side, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(4, 2), nn.Sequential(conv(), conv(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def test_residual_blocks_and_layers_outside_them() -> None:
    """A block without its skip is one by its class; a function between two modules ends the chain."""
    found = units(Glued())
    assert names(found) == ["stem", "body.0", "body.1", "body.2", "head"]
    assert [unit.follows for unit in found] == [False, False, True, True, False]
    assert found[3].layers == ("body.2.expand.0", "body.2.squeeze.down", "body.2.squeeze.up", "body.2.project")


def test_a_network_inside_another_module_is_cut_as_it_is_alone() -> None:
    """A wrapper, a backbone, is no residual block for having some."""
    found = units(nn.Sequential(Glued(), nn.ReLU()))
    assert names(found) == ["0.stem", "0.body.0", "0.body.1", "0.body.2", "0.head"]


def test_branches_and_chains() -> None:
    found = units(nn.Sequential(conv(), Branches(), nn.Sequential(conv(), conv())))
    assert names(found) == ["0", "1", "2.0", "2.1"] and all(unit.follows for unit in found[1:])


def test_layers_with_what_follows_them_in_their_module() -> None:
    found = units(Glued(), "layer")
    assert names(found) == [
        "stem", "body.0.a", "body.0.b", "body.1.a", "body.1.b", "body.2.expand", "body.2.squeeze.down",
        "body.2.squeeze.up", "body.2.project", "head",
    ]  # fmt: skip
    assert [unit.follows for unit in found].count(True) == 0  # functions, a skip, a ReLU, gates between any two


def test_what_writes_to_its_input_says_so() -> None:
    found = units(nn.Sequential(conv(), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)), conv()))
    assert [unit.writes for unit in found] == [False, True, False]
    assert [unit.follows for unit in found] == [False, True, True]


def test_a_layer_that_is_called_twice_is_in_a_unit_with_all_its_calls_or_nothing_is_cut() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.a(self.b(self.a(x)))
            return found

    assert names(units(nn.Sequential(conv(), Twice()), "layer")) == ["0", "1"]
    assert units(Twice(), "layer") == []


@pytest.mark.parametrize(
    ("name", "count"), [("resnet", {"block": 3, "layer": 8}), ("mobilenet", {"block": 20, "layer": 52})]
)
def test_networks_of_transformers(name: str, count: dict[str, int]) -> None:
    net = networks()[name].eval()
    block = net.get_submodule(adapter_for(net).blocks)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for by, wanted in count.items():
        found = units(block, by, x, net)
        layers = [layer for unit in found for layer in unit.layers]
        assert len(found) == wanted and len(layers) == len(set(layers))
        assert len(layers) == sum(kind_of(module) is not None for module in block.modules())


def test_a_chain_of_units_is_the_network() -> None:
    """Units that follow each other, called one after the other, give what the block gives."""
    net = networks()["mobilenet"].eval()
    block = net.get_submodule(adapter_for(net).blocks)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = units(block, "block", x, net)
    seen: list[Tensor] = []
    block.get_submodule(found[0].name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.get_submodule(found[-1].name).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        net(x)
        start, end = seen
        for unit in found:
            assert unit.follows == (unit is not found[0])
            start = block.get_submodule(unit.name)(start)
    assert torch.equal(start, end)
