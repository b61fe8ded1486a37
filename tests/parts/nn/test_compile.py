"""torch.compile: a quantized model is one graph, with the numbers of the model that isn't compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.test_qtensors import MADE
from tests.tiny import MOES, given, input_ids, logits, save_tiny, tiny_model
from torch import Tensor

import nybble
from nybble.kv_format import KVFormat
from nybble.nn import kv_cache
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kv_model import use_quantized_cache
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer

WHOLE = {
    "weights and embeddings": {"weights": "int4 group=16", "embeddings": "int8 channel"},
    "whole numbers": {"weights": "int8 channel", "activations": "int8 token"},
    "every product": {"weights": "nvfp4", "activations": "int8 token", "matmuls": "int8 tensor"},
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was compiled for one test is not the next one's."""
    yield
    torch.compiler.reset()


def compiled(module: Any) -> Any:
    """As one graph, or an error where it would break; without kernels of its own, for which a compiler is needed."""
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def packed(folder: Path, scheme: str) -> Any:
    """A decoder of one layer."""
    recipe = build_recipe("rtn", **WHOLE[scheme])
    nybble.quantize(str(save_tiny(folder / "float", num_hidden_layers=1)), recipe, out=str(folder / "out"))
    return nybble.load(folder / "out")[0]


@pytest.mark.parametrize("scheme", WHOLE)
def test_a_whole_model(tmp_path: Path, scheme: str) -> None:
    model = packed(tmp_path, scheme)
    with torch.no_grad():
        found = compiled(model)(input_ids=input_ids(), use_cache=False).logits
    assert torch.equal(found, logits(model))


def test_a_model_is_exported(tmp_path: Path) -> None:
    """For any number of sequences and tokens, with the weights packed."""
    model, ids = packed(tmp_path, "whole numbers"), input_ids()
    dims = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=64)}, "use_cache": None}
    export: Any = torch.export.export
    exported = export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=dims)
    run = exported.module()
    with torch.no_grad():
        for part in (ids, ids[:1, :7]):
            want = model(input_ids=part, use_cache=False).logits
            assert torch.equal(run(input_ids=part, use_cache=False).logits, want)
    held = [t for name, t in exported.state_dict.items() if "proj.weight" in name and t.dim() == 2]
    assert held and all(t.shape[1] == 1 for t in held)  # scales of rows; no weight in float


def test_a_quantized_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and tokens behind it are one graph each, the cache goes in and out; in float32 the same bits."""
    model, ids = tiny_model(dtype=torch.float32, num_hidden_layers=1, head_dim=16), input_ids()
    use_quantized_cache(model, KVFormat.parse("keys=(nvfp4) values=(int3 token) residual=4"))

    @torch.no_grad()
    def run(called: Any) -> list[Any]:
        found = [called(input_ids=ids, use_cache=True)]
        for at in range(2):
            cache = given(model, found[-1].past_key_values)
            found.append(called(input_ids=ids[:, at : at + 1], use_cache=True, **cache))
        return found

    with monkeypatch.context() as patch:  # as where attention reads rows as they lie, which no compiler follows
        patch.setattr(kv_cache, "DEVICES", frozenset({"cpu"}))
        found = run(compiled(model))
    want = run(model)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(found, want, strict=True))
    made, whole = (outputs[-1].past_key_values.tensors() for outputs in (found, want))
    assert made.keys() == whole.keys() and all(torch.equal(made[name], whole[name]) for name in whole)
    assert any(name.endswith("codes") for name in made)


@pytest.mark.slow
def test_a_decoder_writes_into_a_static_cache(tmp_path: Path) -> None:
    """Token by token, one graph for all of them, with the same bits."""
    from transformers import StaticCache

    model: Any = packed(tmp_path, "weights and embeddings")
    graphs, ids = list[Any](), input_ids()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(called: Any) -> list[Tensor]:
        cache, found = StaticCache(config=model.config, max_cache_len=8), list[Tensor]()
        for at in range(3):
            position = torch.full((len(ids), 1), at)
            given_cache = {"input_ids": ids[:, at : at + 1], "position_ids": position, "use_cache": True}
            found.append(called(**given_cache, **given(model, cache)).logits)
        return found

    with torch.no_grad():
        want, found = run(model), run(torch.compile(model, fullgraph=True, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)) and 1 <= len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning"
)  # as transformers' own wrapper has it
def test_a_decoder_is_exported_with_a_static_cache(tmp_path: Path) -> None:
    """By transformers' wrapper: a token and its place come in, the cache is the program's; weights stay packed."""
    from transformers import StaticCache
    from transformers.integrations import executorch

    wrapper: Any = executorch.TorchExportableModuleWithStaticCache
    if "max_cache_len" not in signature(wrapper).parameters:
        pytest.skip("a transformers whose wrapper takes other arguments")
    model, ids, export = packed(tmp_path, "weights and embeddings"), input_ids()[:1], torch.export
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    module, cache = wrapper(model, batch_size=1, max_cache_len=8, device="cpu"), StaticCache(model.config, 8)
    with torch.no_grad():
        program: Any = export.export(module, (), {"input_ids": ids[:, :1], "cache_position": torch.tensor([0])})
        export.save(program, tmp_path / "decoder.pt2")
        run: Any = export.load(tmp_path / "decoder.pt2").module()
        for at in range(4):
            own = {"input_ids": ids[:, at : at + 1], "use_cache": True, "position_ids": torch.tensor([[at]])}
            want = model(**own, **given(model, cache)).logits
            assert torch.equal(run(input_ids=own["input_ids"], cache_position=torch.tensor([at])), want)
    assert {"nybble.packed_linear", "nybble.packed_rows"} <= {
        str(n.target)[: -len(".default")] for n in program.graph.nodes
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_inductor(tmp_path: Path) -> None:
    """One graph with kernels of the compiler's own around the operators; in float32 it rounds where eager does."""
    model = packed(tmp_path, "weights and embeddings").float()
    with torch.no_grad():
        whole: Any = torch.compile(model, fullgraph=True)
        found = whole(input_ids=input_ids(), use_cache=False).logits
    want = logits(model)
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", MOES)
def test_mixtures_of_experts(tmp_path: Path, family: str) -> None:
    """A decoder block is one graph, with the same bits; a copy of its experts runs its own weights."""
    recipe = build_recipe("rtn", weights="int4 group=16")
    nybble.quantize(str(save_tiny(tmp_path / "float", family, num_hidden_layers=1)), recipe, out=str(tmp_path / "out"))
    model, _ = nybble.load(tmp_path / "out")
    with torch.no_grad():
        found = compiled(model)(input_ids=input_ids(), use_cache=False).logits
    assert torch.equal(found, logits(model))
    block: Any = model
    sparse = block.model.layers[0].mlp
    hidden = torch.randn(1, 5, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(sparse)
    for packed in (m for m in other.modules() if isinstance(m, Packed)):
        next(packed.buffers()).zero_()
    with torch.no_grad():
        found = compiled(other)(hidden)
        assert torch.equal(found, other(hidden)) and not torch.equal(found, sparse(hidden))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at any break
def test_experts_that_pass_gradients_on(tmp_path: Path) -> None:
    """The gradient is the one without a compiler; there the graph may break."""
    folder = save_tiny(tmp_path / "float", "mixtral", num_hidden_layers=1)
    nybble.quantize(folder, "rtn", weights="int8 channel", out=tmp_path / "out")
    model: Any = nybble.load(tmp_path / "out")[0]
    sparse, gradients = model.model.layers[0].mlp, list[Any]()
    for module in (sparse, torch.compile(sparse, backend="eager")):
        hidden = torch.randn(1, 5, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
        module(hidden.requires_grad_()).float().square().sum().backward()
        gradients.append(hidden.grad)
    assert gradients[0].any() and torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", [name for name, make in MADE.items() if len(make().shape) == 2])
def test_every_kind_of_weight(kind: str) -> None:
    """Code books, split columns, low-rank sums, nested scales: and whatever kind a package adds."""
    layer = QuantLinear(MADE[kind]())
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(layer)(x), layer(x))


@pytest.mark.parametrize(
    "line",
    ["int8 token", "nvfp4", "mxfp4", "int8 tensor static", "float4_e2m1fn shifted static", "int4 group=16 scale=mse"],
)
def test_activations_and_their_gradients(line: str) -> None:
    quantizer = Quantizer(line)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    params = quantizer.fit(x / 2) if quantizer.static else None  # a static range that clips
    layer = QuantLinear(
        Quantizer("int4 group=16").quantize(torch.randn(24, 32)), None, ActivationQuantizer(quantizer, params)
    )

    def run(module: Any) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        out = module(given)
        out.square().sum().backward()
        assert given.grad is not None
        return out.detach(), given.grad

    (want, gradient), (found, theirs) = run(layer), run(compiled(layer))
    assert torch.equal(found, want) and gradient.any() and torch.equal(theirs, gradient)
