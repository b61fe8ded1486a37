"""A convolutional network learned block by block, blocks layer by layer: every option of the engine."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.calibration.test_units import Glued, conv
from tests.tiny import tiny_model
from torch import Tensor, nn

import nybble
from nybble.calibration.window import Window
from nybble.core.errors import SchemeError
from nybble.models.adapter import whole_adapter
from nybble.recipe import parse_recipe
from nybble.reconstruction.engine import reconstruct
from nybble.report.record import Report


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pixels(seed: int = 0, samples: int = 8) -> Tensor:
    return torch.randn(samples, 4, 12, 12, generator=torch.Generator().manual_seed(seed))


def network(net: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = Glued() if net is None else net
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
    return net.eval().requires_grad_(False)


def run(
    net: nn.Module | None = None, *, loss: str = "mse", spill: bool = False, **changes: Any
) -> tuple[nn.Module, Report]:
    step = {"reconstruction": loss, "weights": "flexround", "rates": {"rounding": 0.02}, "steps": 30, **changes}
    scheme = {"weights": "int3 channel", "inputs": "int8 tensor static"}
    steps = [{"transform": "fold-batchnorm"}, {"solver": "rtn"}, step]
    settings = nybble.Settings(samples=8, batch=3, dtype=torch.float32, spill=spill)
    recipe = parse_recipe({"name": "made", "scheme": scheme, "steps": [s for s in steps if s]})
    return nybble.quantize(network(net), recipe, pixels(), settings=settings)


def windows(report: Report) -> list[dict[str, Any]]:
    return [w for row in report.layers if row.learned for w in row.learned["windows"] if "curve" in w]


def places(report: Report) -> list[str]:
    return [w["window"].partition("/")[2] for w in windows(report)]


def test_residual_blocks_are_the_windows_of_a_convolutional_network() -> None:
    _, report = run()
    assert places(report) == ["stem", "body.0", "body.1", "body.2", "head"]
    assert all(w["after"] < w["before"] for w in windows(report))
    learned = [row for row in report.layers if row.learned]
    assert len(learned) == 10 and all("left_nearest" in row.learned for row in learned if row.learned)


def test_layers_and_the_whole() -> None:
    assert len(places(run(unit="layer")[1])) == 10
    assert places(run(unit="whole")[1]) == [""]


def test_windows_of_units_overlap_in_a_chain_alone() -> None:
    """Of stem | body.0 body.1 body.2 | head, windows of two."""
    _, report = run(window=2, overlap=1)
    assert places(report) == ["stem", "body.0", "body.1", "head"]
    assert [w["blocks"] for w in windows(report)] == [1, 2, 2, 1]
    inside = {row.name: len(row.learned["windows"]) for row in report.layers if row.learned}
    assert inside["net.body.1.a"] == 2 and inside["net.body.0.a"] == inside["net.body.2.project"] == 1


def test_a_unit_is_fed_what_reaches_it_on_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float network's own tensors on one path; on the other what finished units give as they are stored."""
    seen: dict[str, dict[str, list[Tensor]]] = {}

    def look(window: Window, options: Any) -> Any:
        name = window.blocks[0].within
        seen[name] = {p: [given["hidden"].clone() for _, given in window.inputs(p)] for p in ("float", "quantized")}
        return reconstruct(window, options)

    def keep(caught: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        caught[name] = args[0].clone()

    monkeypatch.setattr("nybble.reconstruction.in_units.reconstruct", look)
    found, _ = run()
    for path, net in (("float", network()), ("quantized", found)):
        caught: dict[str, Tensor] = {}
        for name in seen:
            net.get_submodule(name).register_forward_pre_hook(partial(keep, caught, name))
        with torch.no_grad():
            net(pixels())
        for name, tensors in seen.items():
            assert [len(t) for t in tensors[path]] == [3, 3, 2]
            torch.testing.assert_close(torch.cat(tensors[path]), caught[name], rtol=1e-4, atol=1e-5)


def test_a_network_is_nearer_to_itself_than_as_one_window_and_than_nearest() -> None:
    exact = network()(pixels(1, 64))

    def lost(made: nn.Module) -> float:
        with torch.no_grad():
            return float((made(pixels(1, 64)) - exact).norm() / exact.norm())

    errors = {unit: lost(run(unit=unit, steps=100)[0]) for unit in ("block", "layer", "whole")}
    nearest = lost(run(steps=1, rates={"rounding": 0.0})[0])
    assert errors["block"] < 0.8 * nearest and errors["layer"] < 0.9 * nearest
    assert errors["block"] < errors["whole"]


@pytest.mark.parametrize("part", ["adaround", "flexround", "sign-round", "lsq", "clip", "frozen-codes"])
def test_every_kind_of_part(part: str) -> None:
    rates: dict[str, Any] = {} if part != "adaround" else {"rounding": 0.05}
    _, report = run(weights=part, rates={**rates, "default": 0.01}, steps=10)
    assert len(places(report)) == 5 and any(w["kept"] == "last" and w["after"] < w["before"] for w in windows(report))


@pytest.mark.parametrize(
    "changes",
    [{"mix": 0.5}, {"feed": "float"}, {"inputs": "lsq"}, {"biases": True},
     {"precision": "bfloat16"}, {"optimizer": "sign"}, {"loss": "fisher"}, {"loss": "l2-kl"},
     {"unit": "layer", "loss": "fisher"}],
    ids=str,
)  # fmt: skip
def test_every_option_of_the_engine(changes: dict[str, Any]) -> None:
    """Another result than without, and the same one again; nothing but what it says is learned."""
    changes = {"steps": 6, "rates": {"default": 0.01}, **changes}
    plain = run(steps=6, rates={"default": 0.01}, unit=changes.get("unit", "block"))[0]
    (found, report), (again, _) = run(**changes), run(**changes)
    assert any(w["after"] < w["before"] for w in windows(report))
    assert same(found, again) and not same(found, plain)


def test_the_best_state_of_each_unit_is_kept() -> None:
    """At rates that are too high the last state is not the best one."""
    changes: dict[str, Any] = {"steps": 8, "rates": {"rounding": 0.3}, "diverged": 0}
    (last, best) = (windows(run(**changes)[1]), windows(run(**changes, keep="best", every=2)[1]))
    assert any(isinstance(w["kept"], int) and w["kept"] < 8 for w in best)
    assert best[0]["after"] < last[0]["after"]  # of the first unit, which gets the same in both


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_files_instead_of_memory_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    one, other = run(steps=10)[0], run(steps=10, spill=True)[0]
    assert same(one, other) and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_norms_of_a_unit_learn_with_it() -> None:
    """A norm that reads no convolution is not folded; it learns in its own window alone."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.conv(self.norm(x))
            return found

    net = nn.Sequential(conv(), Normed(), Normed(), nn.Flatten(), nn.Linear(576, 3))
    before = copy.deepcopy(network(net)).state_dict()
    found, report = run(net, norms=True, rates={"rounding": 0.02, "norms": 0.01})
    assert [(w["window"], w["norms"]) for w in windows(report)] == [
        ("window-0000/0", 0), ("window-0000/1", 1), ("window-0000/2", 1), ("window-0000/4", 0),
    ]  # fmt: skip
    assert all(not torch.equal(found.state_dict()[f"{n}.norm.weight"], before[f"{n}.norm.weight"]) for n in (1, 2))


class Halved(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5) if self.in_place else x * 0.5


def test_a_unit_that_writes_to_its_input_does_not_spoil_it() -> None:
    """The same network with a step that makes a new tensor comes to the same codes."""
    net = nn.Sequential(conv(), nn.Sequential(Halved(True), nn.Conv2d(4, 4, 1)))
    other: Any = copy.deepcopy(net)
    other[1][0].in_place = False
    assert same(run(net, steps=10)[0], run(other, steps=10)[0])


def test_blocks_of_language_models_layer_by_layer() -> None:
    """Each layer on its own inputs."""
    model = tiny_model(dtype=torch.float32)
    ids = torch.randint(0, 60, (6, 10), generator=torch.Generator().manual_seed(0))
    step = {"reconstruction": "mse", "weights": "flexround", "rates": {"rounding": 0.02}, "steps": 15, "unit": "layer"}
    recipe = parse_recipe({"name": "made", "scheme": {"weights": "int3 channel"}, "steps": [{"solver": "rtn"}, step]})
    settings = nybble.Settings(samples=6, seq_len=10, batch=2, dtype=torch.float32)
    _, report = nybble.quantize(model, recipe, ids, settings=settings)
    found = windows(report)
    assert sum(w["after"] < w["before"] for w in found) > len(found) / 2
    inside = [w["window"] for w in found if w["window"].startswith("window-0001/")]
    layers = [f"self_attn.{side}_proj" for side in "qkvo"] + [f"mlp.{side}_proj" for side in ("gate", "up", "down")]
    assert inside == [f"window-0001/{name}" for name in layers]


@pytest.mark.parametrize(("unit", "count"), [("block", 2), ("layer", 14), ("whole", 1)])
def test_models_that_are_one_block_are_cut_as_networks_are(
    unit: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A llama that nobody knows how to walk: data flow shows its blocks."""
    monkeypatch.setattr("nybble.walk.job.adapter_for", lambda model: whole_adapter(model, "it is one block here"))
    ids = torch.randint(0, 60, (4, 10), generator=torch.Generator().manual_seed(0))
    step = {"reconstruction": "mse", "weights": "flexround", "steps": 2, "unit": unit}
    recipe = parse_recipe({"name": "made", "scheme": {"weights": "int3 channel"}, "steps": [{"solver": "rtn"}, step]})
    settings = nybble.Settings(samples=4, seq_len=10, batch=2, dtype=torch.float32)
    _, report = nybble.quantize(tiny_model(dtype=torch.float32), recipe, ids, settings=settings)
    assert len(places(report)) == count
    assert unit != "block" or places(report) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("window", [1, 2])
def test_padding_is_left_out_of_every_unit(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in it, behind the tokens of causal samples: the same losses, and the same codes.

    With linear layers in a row, so that streams move on from unit to unit, and windows hold two of them.
    """
    if window > 1:  # of layers in a model that is one block
        monkeypatch.setattr("nybble.walk.job.adapter_for", lambda model: whole_adapter(model, "it is one block here"))
    ids = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(0))
    real = torch.arange(10) < torch.tensor([[10], [4], [7], [2]])
    step = {"reconstruction": "mse", "weights": "flexround", "rates": {"rounding": 0.02}, "steps": 2, "unit": "layer"}
    steps = [{"solver": "rtn"}, {**step, "window": window}]
    recipe = parse_recipe({"name": "made", "scheme": {"weights": "int3 channel"}, "steps": steps})
    settings = nybble.Settings(samples=4, seq_len=10, batch=2, dtype=torch.float32)
    found = []
    for padding in (0, 77):
        model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
        torch.manual_seed(0)
        model.model.layers[0].mlp = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))).eval()
        given = {"input_ids": ids.where(real, padding), "attention_mask": real.long()}
        found.append(nybble.quantize(model, recipe, given, settings=settings))
    (one, report), (other, again) = found
    assert {w["blocks"] for w in windows(report)} == set(range(1, window + 1))
    assert windows(report) == windows(again) and same(one, other)


def test_refusals() -> None:
    recipe = {"name": "made", "scheme": {"weights": "int4 channel"}, "steps": [{"solver": "rtn"}]}
    step = {"reconstruction": "mse", "weights": "flexround", "unit": "layer"}
    with pytest.raises(SchemeError, match=r"window=2 counts blocks in LlamaForCausalLM.*window=1"):
        made = parse_recipe({**recipe, "steps": [{"solver": "rtn"}, {**step, "window": 2}]})
        nybble.quantize(tiny_model(), made, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(SchemeError, match=r"window=2 counts units, and unit=whole.*window=1, or unit=block"):
        run(unit="whole", window=2)
    with pytest.raises(SchemeError, match=r"block=let ties layers.*unit=layer.*unit=block"):
        made = parse_recipe(
            {**recipe, "steps": [{"solver": "rtn"}, {"reconstruction": "mse", "block": "let", "unit": "layer"}]}
        )
        nybble.quantize(tiny_model(), made, torch.zeros(1, 4, dtype=torch.int64))
