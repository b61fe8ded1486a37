"""Supernets: an architecture is its config's network on leading slices; mixtures, collapse, the sandwich."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.parts.training.test_text_tasks import BERT
from torch import Tensor, nn
from transformers import BartConfig
from transformers import BartForConditionalGeneration as Bart

from nybble.core.errors import ModelError, NybbleError, SchemeError, UsageError
from nybble.models.own.bottleneck import BottleneckConfig, BottleneckForMaskedLM
from nybble.quantizer import Quantizer
from nybble.search.evolution import Encoding
from nybble.search.supernet.net import Supernet
from nybble.search.supernet.sandwich import Sandwich
from nybble.search.supernet.space import Space, make_space
from nybble.training.objective import make_losses
from nybble.training.tasks import TASKS

BART: Any = Bart
CHOICES = {"d_model": [16, 24], "encoder_ffn_dim": [16, 40], "decoder_ffn_dim": [24, 40], "decoder_layers": [1, 2],
           "encoder_attention_heads": [2, 4]}  # fmt: skip
SOME: list[Encoding] = [(1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (0, 1, 0, 1, 1), (1, 0, 1, 0, 0)]


def bart(**changes: Any) -> Any:
    """At its largest sizes, with large weights."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=40, d_model=24, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40, decoder_ffn_dim=40,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=20, init_std=0.3, dropout=0.0,
        architectures=["BartForConditionalGeneration"], **changes,
    )  # fmt: skip
    return BART(config).eval()


def supernet(formats: tuple[str, ...] = (), **options: Any) -> Any:
    """Of that, its experts apart."""
    model = bart()
    made: Any = Supernet(model, make_space(model.config, CHOICES, formats), **options).eval()
    torch.manual_seed(1)
    for mixture in made.mixtures:
        nn.init.normal_(mixture.weights, std=0.3)
        nn.init.normal_(mixture.biases, std=0.3)
    return made


def batch() -> dict[str, Tensor]:
    """Two pairs, one of them padded."""
    torch.manual_seed(2)
    ids = torch.randint(3, 40, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 40, (2, 5))}


def by_hand(model: Any, space: Space, encoding: Encoding) -> Any:
    """The config's own model, its tensors copied from the leading part of the largest one's."""
    made: Any = BART(space.config_of(encoding)).eval()
    whole = model.state_dict()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            tensor.copy_(whole[name][tuple(slice(size) for size in tensor.shape)])
    return made


@pytest.mark.parametrize("encoding", SOME)
def test_one_expert_is_plain_sharing_bit_for_bit(encoding: Encoding) -> None:
    """Outputs, and gradients, which are zero outside the slice."""
    made = supernet()
    plain = by_hand(copy.deepcopy(made.model), made.space, encoding)
    assert len(made.mixtures) == 0 and plain.config.decoder_layers == encoding[3] + 1
    expected = plain(**batch())
    with made.running(encoding):
        found = made(**batch())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    slices = dict(plain.named_parameters())
    for name, parameter in made.model.named_parameters():
        if name not in slices:
            assert parameter.grad is None
            continue
        whole = torch.zeros_like(parameter)
        whole[tuple(slice(size) for size in slices[name].shape)] = slices[name].grad
        assert torch.equal(parameter.grad, whole), name


@pytest.mark.parametrize("router", ["layer", "neuron"])
def test_equal_experts_give_no_gradient_to_the_router_and_unequal_ones_do(router: Any) -> None:
    model = bart()
    made: Any = Supernet(model, make_space(model.config, CHOICES), experts=3, router=router).eval()
    with made.running(SOME[2]):
        before = made(**batch())
        before.loss.backward()
    routers = [p for mixture in made.mixtures for p in mixture.router.parameters()]
    assert all(p.grad is None or p.grad.abs().max() < 1e-7 for p in routers)
    shares = [m.weights.grad.abs().sum((1, 2)) for m in made.mixtures if m.weights.grad is not None]
    assert all(abs(float(share[0] / share[1]) - 1) > 1e-3 for share in shares)  # what makes experts come apart
    for p in routers:
        nn.init.normal_(p, std=0.1)
    with made.running(SOME[2]):
        torch.testing.assert_close(made(**batch()).logits, before.logits, rtol=1e-5, atol=1e-5)
        nn.init.normal_(made.mixtures[0].weights[1])
        made(**batch()).loss.backward()
    assert max(float(p.grad.abs().max()) for p in made.mixtures[0].router.parameters()) > 1e-6


@pytest.mark.parametrize("router", ["layer", "neuron"])
def test_shares_and_the_mixture_they_make(router: Any) -> None:
    """Shares sum to 1 and aren't negative, each weight lies between the experts', by the formula in float64."""
    made = supernet(experts=3, router=router)
    mixture = made.mixtures[0]
    linear = made.model.get_submodule(made.mixed[0])
    numbers = made.space.numbers(SOME[2])
    shares = mixture.shares(numbers, 16)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(16))
    assert (shares[0] == shares[1]).all() == (router == "layer")
    weight, bias = mixture(linear.weight, linear.bias, numbers, (16, 20))
    experts = torch.cat((linear.weight[None], mixture.weights))[:, :16, :20]
    assert (weight >= experts.amin(0) - 1e-6).all() and (weight <= experts.amax(0) + 1e-6).all()
    expected = sum(torch.diag(shares[:, i].double()) @ experts[i].double() for i in range(3))
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    biases = torch.cat((linear.bias[None], mixture.biases))[:, :16]
    torch.testing.assert_close(bias, (shares.T * biases).sum(0))


def test_neuron_wise_shares_that_are_constant_are_layer_wise() -> None:
    made, other = supernet(experts=2, router="neuron"), supernet(experts=2, router="layer")
    for by_neuron, by_layer in zip(made.mixtures, other.mixtures, strict=True):
        first, last = by_neuron.router, by_layer.router
        first[0].load_state_dict(last[0].state_dict())
        with torch.no_grad():
            first[3].weight.copy_(last[3].weight.repeat(len(first[3].weight) // 2, 1))
            first[3].bias.copy_(last[3].bias.repeat(len(first[3].bias) // 2))
    for encoding in SOME:
        with made.running(encoding), other.running(encoding):
            torch.testing.assert_close(made(**batch()).logits, other(**batch()).logits, rtol=1e-5, atol=1e-5)


def test_a_narrow_layer_has_the_first_rows_of_the_whole_mixture() -> None:
    made = supernet(experts=3)
    mixture = made.mixtures[0]
    linear = made.model.get_submodule(made.mixed[0])
    numbers = made.space.numbers(SOME[1])
    assert torch.equal(mixture.shares(numbers, 5), mixture.shares(numbers, 40)[:5])
    whole, _ = mixture(linear.weight, linear.bias, numbers, (40, 24))
    part, _ = mixture(linear.weight, linear.bias, numbers, (16, 16))
    assert torch.equal(part, whole[:16, :16])
    flat = mixture.router(numbers)  # neuron-major: number j m + i is of neuron j and expert i
    torch.testing.assert_close(mixture.shares(numbers, 40)[7], flat[21:24].softmax(0))


@pytest.mark.parametrize("encoding", SOME)
def test_collapse_is_the_plain_network(encoding: Encoding, tmp_path: Any) -> None:
    """Saved and loaded by transformers, it gives what the supernet gave, with a plain network's parameters."""
    made = supernet(experts=2)
    with made.running(encoding), torch.no_grad():
        expected = made(**batch()).logits
    found = made.collapsed(encoding)
    found.save_pretrained(tmp_path)
    loaded: Any = BART.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert float((loaded(**batch()).logits - expected).abs().max()) < 1e-6
    plain = BART(made.space.config_of(encoding))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in plain.parameters())
    assert made.parameters_of(encoding) == sum(p.numel() for p in plain.parameters())


def test_the_sandwich_is_the_sum_of_three_backward_passes() -> None:
    made = supernet(experts=2)
    task = TASKS.get("translation")
    given, losses = batch(), make_losses({"task": 1.0})
    torch.manual_seed(7)
    total: Any = Sandwich(task, losses, None)(made, given, 0.0)
    total.backward()
    summed = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    torch.manual_seed(7)
    between = tuple(int(torch.randint(size, (1,))) for size in made.space.sizes)
    lost = 0.0
    for encoding in (made.space.largest, made.space.smallest, between):
        with made.running(encoding):
            loss = made(**batch()).loss
        loss.backward()
        lost += loss.item()
    assert between not in (made.space.largest, made.space.smallest) and total.item() == pytest.approx(lost)
    for name, p in made.named_parameters():
        torch.testing.assert_close(summed[name], p.grad, rtol=1e-4, atol=1e-6)
    assert made.active == made.space.largest


def test_weights_are_rounded_behind_the_mixing() -> None:
    """As nybble quantizes the collapsed network; gradients pass to all experts."""
    made = supernet(experts=2, formats=("float", "int4 channel"))
    for encoding in ((0, 1, 0, 1, 1, 1), (1, 1, 1, 1, 1, 0)):
        exact, rounded = made.collapsed(encoding, rounded=False), made.collapsed(encoding)
        for name, module in exact.named_modules():
            if isinstance(module, nn.Linear):
                inside = encoding[-1] == 1 and ".layers." in name
                weight = module.weight.detach()
                expected = Quantizer("int4 channel").fake_quantize(weight) if inside else weight
                assert torch.equal(rounded.get_submodule(name).weight, expected), name
    with made.running((0, 1, 0, 1, 1, 1)):
        made(**batch()).loss.backward()
    assert float(made.mixtures[0].weights.grad.abs().max()) > 0
    assert made.space.numbers((0, 0, 0, 0, 0, 1))[-1] == 0.25 and made.space.numbers((0, 0, 0, 0, 0, 0))[-1] == 1


def test_what_can_not_be_a_supernet() -> None:
    model = bart()
    for choices, words in (
        ({"d_model": [24, 48]}, "between 1 and the model's 24"), ({"d_modle": [24]}, "no 'd_modle'"),
        ({"d_model": []}, "needs values"), ({"d_model": [8, 8]}, "each once"), ({}, "one architecture"),
        ({"d_model": "24"}, "list of whole numbers"),
    ):  # fmt: skip
        with pytest.raises(NybbleError, match=words):
            make_space(model.config, choices)
    space = make_space(model.config, CHOICES)
    with pytest.raises(UsageError, match="2 experts or more; got 0"):
        Supernet(model, space, experts=0)
    with pytest.raises(SchemeError, match="nothing is mixed"):
        Supernet(model, space, mixed=["re:.*nothing"])
    with pytest.raises(ModelError, match=r"embed_dim must be divisible|divisible"):
        Supernet(model, make_space(model.config, {"d_model": [10, 24]}))
    made = supernet(experts=2)
    mixture = made.mixtures[0]
    with pytest.raises(ModelError, match="reads 5 numbers"):
        mixture.shares(torch.zeros(4), 3)
    with pytest.raises(ModelError, match="NaN or Inf"):
        mixture.shares(torch.full((5,), float("nan")), 3)
    for wrong in ((0, 0), (0, 0, 0, 0, 2)):
        with pytest.raises(UsageError, match="no architecture of this space"), made.running(wrong):
            pass


@pytest.mark.parametrize("widths", [[8, 16], [32, 8], [16, 16]])
def test_an_encoder_s_layers_have_widths_of_their_own(widths: list[int]) -> None:
    """Gradients and outputs are those of the network with these widths on leading slices; routers read each width."""
    config = BottleneckConfig(**{**BERT, "num_hidden_layers": 2, "architectures": ["BottleneckForMaskedLM"]})
    torch.manual_seed(0)
    encoder: Any = BottleneckForMaskedLM
    model = encoder(config).eval()
    space = make_space(config, {"widths": [8, 16, 32]})
    made = Supernet(model, space).eval()
    assert made.mixed == [f"bert.encoder.layer.{i}.layer.{n}.dense" for i in (0, 1) for n in ("intermediate", "output")]
    encoding = tuple([8, 16, 32].index(width) for width in widths)
    assert space.values(encoding) == {"widths": widths}
    assert space.numbers(encoding).tolist() == pytest.approx([0.01 + (width - 8) / 24 for width in widths])
    plain = encoder(BottleneckConfig(**{**BERT, "widths": widths})).eval()
    whole = model.state_dict()
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            tensor.copy_(whole[name][tuple(slice(size) for size in tensor.shape)])
    given = {"input_ids": torch.tensor([[1, 7, 9, 4, 2]]), "labels": torch.tensor([[-100, 7, -100, 4, -100]])}
    with made.running(encoding):
        found = made(**given)
    assert torch.equal(found.loss, plain(**given).loss)
    found.loss.backward()
    plain(**given).loss.backward()
    for name, parameter in plain.named_parameters():
        part = model.get_parameter(name).grad[tuple(slice(size) for size in parameter.shape)]
        assert torch.equal(part, parameter.grad), name
