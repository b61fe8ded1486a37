"""Sensitivities against explicit Hessians, moments and divergences of small networks."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError
from nybble.data.kinds import Batch
from nybble.nn.kinds import targets_of
from nybble.quantizer import Quantizer
from nybble.search.curvature import Curvature
from nybble.search.losses import own_labels
from nybble.search.sensitivities import REGISTRY, Sensitivity
from nybble.search.sensitivities.gradient import Gradient
from nybble.search.sensitivities.hessian_top import HessianTop
from nybble.search.sensitivities.hessian_trace import HessianTrace
from nybble.search.sensitivities.kl import Kl
from nybble.search.sensitivities.output_error import OutputError
from nybble.search.sensitivities.weight_error import WeightError
from nybble.search.study import Layer, Study

MENU = ("int2 group=4 pad=true", "int4 group=4 pad=true", "int8 group=4 pad=true")


class Net(nn.Module):
    """Three layers with smooth activations, and logits."""

    def __init__(self, sizes: tuple[int, ...] = (6, 8, 5, 4)) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))

    def forward(self, x: Tensor) -> Any:
        for layer in [*self.layers][:-1]:
            x = torch.tanh(layer(x))
        return SimpleNamespace(logits=self.layers[-1](x))


def cross_entropy(output: Any, batch: Batch) -> Tensor:
    labels = torch.arange(len(output.logits)) % output.logits.shape[-1]
    return nn.functional.cross_entropy(output.logits.double(), labels)


def study(model: nn.Module, batches: list[Tensor], loss: Any = cross_entropy, menu: tuple[str, ...] = MENU) -> Study:
    quantizers = [Quantizer(line) for line in menu]
    layers = [
        Layer(target=target, menu=[q.fitted(target.shape) for q in quantizers]) for target in targets_of(model).values()
    ]
    return Study(model=model, layers=layers, batches=[Batch(inputs={"x": x}, real=None) for x in batches], loss=loss)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Net, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype).eval(), [torch.randn(12, 6, dtype=dtype), torch.randn(12, 6, dtype=dtype)]


def blocks(given: Study) -> list[Tensor]:
    """The diagonal blocks of the Hessian of the mean loss over batches, element by element."""
    found = []
    for layer in given.layers:
        name = f"{layer.name}.weight"
        weight = given.model.get_parameter(name).detach()

        def loss(flat: Tensor, name: str = name, shape: torch.Size = weight.shape) -> Tensor:
            values = {name: flat.view(shape)}
            losses = [
                given.loss(torch.func.functional_call(given.model, values, (batch.inputs["x"],)), batch)
                for batch in given.batches
            ]
            return torch.stack(losses).mean()

        found.append(torch.autograd.functional.hessian(loss, weight.flatten()))  # type: ignore[no-untyped-call]
    return found


def errors(given: Study) -> Tensor:
    """Squared errors of weights by the quantizers themselves."""
    rows = []
    for layer in given.layers:
        weight = given.model.get_parameter(f"{layer.name}.weight").detach().float()
        rows.append(
            [float((q.of_model(torch.bfloat16).fake_quantize(weight) - weight).square().sum()) for q in layer.menu]
        )
    return torch.tensor(rows, dtype=torch.float64)


def test_products_are_the_rows_of_the_explicit_hessian() -> None:
    given = study(*network())
    generator = torch.Generator().manual_seed(1)
    with given.differentiable():
        curvature = Curvature(given)
        for layer, block in zip(given.layers, blocks(given), strict=True):
            u, v = (curvature.vector(layer, generator, signs=False) for _ in range(2))
            product = curvature.product(layer, v)[0]
            torch.testing.assert_close(product.flatten(), block @ v[0].flatten(), rtol=1e-9, atol=1e-12)
            back = (curvature.product(layer, u)[0] * v[0]).sum()
            torch.testing.assert_close((product * u[0]).sum(), back)
    assert not any(parameter.requires_grad != True for parameter in given.model.parameters())  # noqa: E712


def test_traces_and_eigenvalues_are_those_of_the_blocks() -> None:
    """Eigenvalues within 1e-3, traces within four deviations of Hutchinson's estimate."""
    model, batches = network()
    given = study(model, batches[:1])
    explicit = blocks(given)
    top = HessianTop(iterations=300, tolerance=1e-5).eigenvalues(given)
    for found, block in zip(top, explicit, strict=True):
        values = torch.linalg.eigvalsh(block)
        assert found == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)
    traces = HessianTrace(probes=150, tolerance=0).traces(given)
    for found, block in zip(traces, explicit, strict=True):
        spread = (2 * (block.square().sum() - block.diagonal().square().sum())).sqrt() / 150**0.5
        assert abs(found - float(block.trace())) < 4 * float(spread)  # Var = 2 sum of H_ij^2 off the diagonal
    sizes = torch.tensor([layer.target.shape[0] * layer.target.shape[1] for layer in given.layers])
    expected = errors(given) * (torch.tensor(traces).clamp(min=0) / sizes)[:, None]
    torch.testing.assert_close(HessianTrace(probes=150, tolerance=0).measure(given), expected, rtol=1e-6, atol=0)


class Vector(nn.Module):
    """One weight [n, 1], given out."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Linear(1, n, bias=False).double()

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.w(x))


def quadratic(matrix: Tensor) -> Study:
    n = len(matrix)
    loss = lambda output, batch: output.logits[0] @ matrix @ output.logits[0] / 2  # noqa: E731
    return study(Vector(n), [torch.ones(1, 1, dtype=torch.float64)], loss, ("int4 channel",))


def test_a_quadratic_loss() -> None:
    """Its matrix is the Hessian: with its sign, exact after one probe where it is diagonal, 0 where there is none."""
    drawn = torch.randn(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = drawn @ drawn.T / 40
    given = quadratic(matrix)
    assert HessianTop(tolerance=1e-6, iterations=1000).eigenvalues(given)[0] == pytest.approx(
        float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3
    )
    assert HessianTrace(probes=400, tolerance=0).traces(given)[0] == pytest.approx(float(matrix.trace()), rel=0.05)
    diagonal = torch.linspace(-3, 1, 40, dtype=torch.float64).diag()
    assert HessianTrace(probes=1).traces(quadratic(diagonal))[0] == pytest.approx(float(diagonal.trace()), rel=1e-12)
    assert HessianTop(tolerance=1e-9, iterations=2000).eigenvalues(quadratic(diagonal))[0] == pytest.approx(
        -3, rel=1e-3
    )
    nothing = quadratic(torch.zeros(40, 40, dtype=torch.float64))
    assert HessianTop().eigenvalues(nothing) == [0.0] and HessianTrace().traces(nothing) == [0.0]


@pytest.mark.parametrize("part", [HessianTrace(probes=2), HessianTop(iterations=3)])
def test_a_loss_times_ten_scales_all_and_orders_nothing(part: Sensitivity) -> None:
    given = study(*network(1))
    ten = study(given.model, [b.inputs["x"] for b in given.batches], lambda o, b: 10 * cross_entropy(o, b))
    torch.testing.assert_close(part.measure(ten), 10 * part.measure(given), rtol=1e-6, atol=0)


def test_output_error_is_that_of_the_outputs() -> None:
    model, batches = network(2, torch.float32)
    given = study(model, batches)
    found, absolute = OutputError().measure(given), OutputError(relative=False).measure(given)
    x = torch.cat(batches)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, nn.Linear)
        out = x @ layer.weight.detach().T
        for item, quantizer in enumerate(given.layers[number].menu):
            lost = (x @ quantizer.of_model(torch.bfloat16).fake_quantize(layer.weight.detach()).T - out).square().sum(1)
            assert float(absolute[number, item]) == pytest.approx(float(lost.mean()), rel=1e-4)
            relative = float(lost.sum() / out.square().sum()) * layer.out_features
            assert float(found[number, item]) == pytest.approx(relative, rel=1e-4)
        x = torch.tanh(layer(x)).detach()
    diagonal = OutputError(moments="diagonal", relative=False).measure(given)
    first = torch.cat(batches).square().mean(0)
    change = given.change(given.layers[0], 0)[0]
    assert float(diagonal[0, 0]) == pytest.approx(float((change.square() * first).sum()), rel=1e-4)


def test_gradients_are_squared_batch_by_batch() -> None:
    given = study(*network(3))
    found = Gradient().measure(given)
    squares = []
    for batch in given.batches:
        loss = given.loss(given.model(batch.inputs["x"]), batch)
        squares.append(torch.autograd.grad(loss, [given.model.get_parameter("layers.1.weight")])[0].square())
    expected = (torch.stack(squares).mean(0) * given.change(given.layers[1], 0)[0].square()).sum() / 2
    assert float(found[1, 0]) == pytest.approx(float(expected), rel=1e-5)


def test_kl_is_that_of_one_layer_alone() -> None:
    model, batches = network(4, torch.float32)
    given, before = study(model, batches), {k: v.clone() for k, v in network(4, torch.float32)[0].state_dict().items()}
    found = Kl().measure(given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other, x = network(4, torch.float32)[0], torch.cat(batches)
    weight = other.get_parameter("layers.2.weight")
    weight.data = given.layers[2].menu[1].of_model(torch.bfloat16).fake_quantize(weight.data)
    p, q = (torch.log_softmax(net(x).logits, -1).detach() for net in (model, other))
    assert float(found[2, 1]) == pytest.approx(
        float(nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)), rel=1e-4
    )


def test_noise_weighs_layers_by_what_predictions_feel() -> None:
    """A layer whose output is shrunk hundredfold matters less to predictions, and as much to its own error."""
    model, batches = network(5, torch.float32)
    plain, felt = WeightError(), WeightError(scaled_by="noise")
    given = study(model, batches)
    before = felt.measure(given)
    assert torch.equal(before, felt.measure(study(model, batches)))
    with torch.no_grad():
        for name in ("layers.2.weight", "layers.2.bias"):
            model.get_parameter(name).mul_(0.01)
    after = felt.measure(study(model, batches))
    assert bool((after[0] < before[0] / 100).all())
    torch.testing.assert_close(plain.measure(study(model, batches))[0], plain.measure(given)[0])


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_sensitivity_falls_with_bits_and_repeats(name: str) -> None:
    few = {"hessian-trace": {"probes": 4}, "hessian-top": {"iterations": 8}}
    part: Sensitivity = REGISTRY.make(name, few.get(name, {}))
    found = part.measure(study(*network(6)))
    assert found.shape == (3, 3) and found.dtype == torch.float64
    assert bool((found[:, 0] > found[:, 1]).all() and (found[:, 1] > found[:, 2]).all() and (found >= 0).all())
    assert torch.equal(found, part.measure(study(*network(6))))


@pytest.mark.parametrize("name", [n for n in REGISTRY.names() if REGISTRY.get(n).differentiates])
def test_losses_without_a_gradient(name: str) -> None:
    model, batches = network(7)
    part: Sensitivity = REGISTRY.make(name, {})
    with pytest.raises(ModelError, match=r"the loss has no gradient.*--method weight-error"):
        part.measure(study(model, batches, lambda o, b: o.logits.argmax(-1).double().mean()))
    with pytest.raises(ModelError, match=r"the loss has the shape \[12\]"):
        part.measure(study(model, batches, lambda o, b: o.logits.sum(1)))
    with pytest.raises(DataError, match=r"gradient of the loss by layers.0 is NaN"):
        part.measure(study(model, batches, lambda o, b: o.logits.sum() * float("nan")))
    with pytest.raises(DataError, match="there is none"):
        part.measure(study(model, []))


def test_the_loss_on_labels_of_its_own_is_a_mean_of_the_same_draws() -> None:
    """Of alike chances log 3 whatever is drawn, padding left out; of others the same value at each call."""
    real = torch.tensor([[True, True, False, False], [True, True, True, False]])
    for logits, mask in ((torch.zeros(5, 3), None), (torch.zeros(2, 4, 3), None), (torch.zeros(2, 4, 3), real)):
        found = own_labels(SimpleNamespace(logits=logits), Batch(inputs={}, real=mask))
        assert float(found) == pytest.approx(math.log(3))
    unlike = SimpleNamespace(logits=torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    first = own_labels(unlike, Batch(inputs={}, real=None))
    torch.manual_seed(2)
    assert torch.equal(first, own_labels(unlike, Batch(inputs={}, real=None)))
