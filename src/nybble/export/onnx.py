"""One ONNX file with QDQ nodes, which onnxruntime and what is built on it run: encoders, vision models, CNNs.

Weights are stored as nybble's own codes, in ONNX's integer and float8 types, behind ``DequantizeLinear``; inputs go
through ``QuantizeLinear`` and back. Runtimes fuse both with the products around them, or calculate in float32 as
nybble does. torch's exporter traces the network around them; batch size and tokens stay free.
Source: github.com/onnx/onnx, ``docs/Operators.md`` (QuantizeLinear, DequantizeLinear).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.core.guard import reading
from nybble.core.seeds import preserve_global_rng
from nybble.export import ExportTarget, Facts, Refusal, Takes, Verified
from nybble.export._folder import write_beside
from nybble.export._onnx_graph import mark_layers, retype
from nybble.export._onnx_integer import INPUT, OUTPUT, compare_integer_graph, write_integer_graph
from nybble.export._onnx_judge import judge_layers
from nybble.export._onnx_layers import OPSET, put_nodes
from nybble.export._onnx_verify import compare_outputs, compare_weights, versions
from nybble.export._onnx_weights import check_activation, form_of
from nybble.export._source import Layer, Source
from nybble.export._transformers import _inputs, _silently
from nybble.models.sources.layouts._ct_args import CannotError
from nybble.nn.integer.convert import integer_network
from nybble.nn.integer.modules import Product
from nybble.nn.integer.network import IntegerNetwork
from nybble.nn.kinds import Kind
from nybble.nn.kinds.conv import PART as CONV
from nybble.nn.kinds.embedding import PART as EMBEDDING
from nybble.nn.kinds.linear import PART as LINEAR
from nybble.scheme import Scheme

FILE, INTEGER = "model.onnx", "integer"
MOST = 1_800_000_000
"""Bytes of tensors in one file, below protobuf's 2 GiB; more stand beside it."""
_NEEDS = ("onnx", "onnxscript", "onnxruntime")
_KINDS: tuple[Kind, ...] = (LINEAR, CONV, EMBEDDING)
_PULL = "https://github.com/microsoft/onnxruntime/pull/"
_ROUNDS = "float inputs are rounded to int8, unless session.qdq_matmulnbits_accuracy_level is 1"
_CARD = """`{file}` runs in onnxruntime (`onnxruntime.InferenceSession("{file}")`) and wherever opset {opset}
does; nybble is not needed. Inputs: {inputs}. Outputs: {outputs}."""


def _row(weights: str, inputs: str, form: str, since: str, pull: int, note: str) -> Takes:
    return Takes(
        weights=weights,
        inputs=inputs,
        form=form,
        runtime="onnxruntime",
        since=since,
        source=f"{_PULL}{pull}",
        note=note,
    )


class Onnx(ExportTarget):
    """QDQ."""

    summary = "an ONNX file with QDQ nodes for onnxruntime: encoders, vision models, CNNs"
    loses = "16-bit floats become float32; tokens of more than one length, but not images of another size, can be given"
    options: ClassVar[dict[str, str]] = {
        "int8": "signed inputs have int8 codes, which TensorRT asks for; by default uint8 ones, 128 higher, for CPUs",
        "integer": "a CNN as eval --integer runs it, bit for bit: ConvInteger, MatMulInteger, shifts, no QDQ nodes",
    }
    # Run in 1.17.3, which refuses all, 1.18.1, 1.19.2, and every second one up to 1.32.0.
    takes: ClassVar[tuple[Takes, ...]] = (
        _row("int8 (tensor, channel)", "int8 static, uint8 symmetric=false static", "QDQ INT8", "1.18", 19745, ""),
        _row("int8 (tensor, channel)", "float", "QDQ INT8", "1.18", 19745, _ROUNDS),
        _row("int8 group=N", "float", "QDQ INT8", "1.19", 20901, _ROUNDS),
        _row(
            "int2, int3, int4, ternary (tensor, channel, group=N)", "float, int8 (tensor, token)", "QDQ INT4", "1.19",
            20362, _ROUNDS,
        ),
        _row("float8_e4m3fn, float8_e5m2", "float", "QDQ FLOAT8", "1.18", 19745, "calculates in float32 on CPUs"),
        _row(
            "float8_e4m3fn, float8_e5m2", "float8_e4m3fn static", "QDQ FLOAT8", "1.32", 19745,
            "calculates in float32 on CPUs; up to 1.31 it refuses the file",
        ),
    )  # fmt: skip

    def require(self, check: bool) -> None:  # noqa: D102
        _need(_NEEDS if check else _NEEDS[:2])

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:
        """Nothing is changed; what it can't hold is refused.

        Raises:
            SchemeError: names the layer and the nearest. ModelError: a model that it holds in no scheme.
        """
        if (refusal := _whole_refused(facts.model)) is not None:
            raise ModelError(f"target onnx can't hold {refusal.came}; it takes {refusal.nearest}.")
        if scheme.kv is not None and scheme.kv.stores:
            raise SchemeError("onnx has no KV cache; leave --kv out, or take the target gguf or compressed-tensors.")
        for name, rule in scheme.match(facts.classes).rules.items():
            target = facts.targets[name]
            try:
                _check_kind(target.kind)
                if rule.weights is not None:
                    form_of(rule.weights.quantize(torch.empty(target.shape, device="meta")))
                for side in (rule.inputs, rule.outputs):
                    if side is not None:
                        check_activation(side)
            except CannotError as error:
                raise SchemeError(f"{name}: onnx can't hold {error}.") from error
        return scheme

    def check(self, source: Source) -> list[Refusal]:  # noqa: D102
        found: dict[tuple[str, str, str], list[str]] = {}
        for layer in source.layers.values():
            try:
                _check_layer(layer)
            except CannotError as error:
                found.setdefault((error.came, error.nearest, error.why), []).append(layer.name)
        refusals = [Refusal(layers=tuple(n), came=c, nearest=near, why=why) for (c, near, why), n in found.items()]
        whole = _whole_refused(source.skeleton(), source.kv is not None)
        return refusals if whole is None else [*refusals, whole]

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        lines = []
        if source.dtype != torch.float32:
            lines.append(f"what is in {str(source.dtype).removeprefix('torch.')} becomes float32")
        if any(layer.weights and layer.inputs is None for layer in source.layers.values()):
            lines.append(
                "onnxruntime rounds the inputs of weight-only products to int8 unless the session option "
                "session.qdq_matmulnbits_accuracy_level is 1"
            )
        return lines

    def write(self, source: Source, folder: Path) -> None:
        """The whole model is in memory, its codes a byte each: torch's exporter traces it.

        Above :data:`MOST` bytes they stand in a file beside, ``model.onnx.data``, and are written one by one. The
        option ``integer`` has a graph of its own, which :mod:`nybble.export._onnx_integer` writes.

        Raises:
            ModelError: the exporter can't trace this model, or it has no integer network. SchemeError: as of
                :func:`nybble.nn.integer.convert.integer_network`.
        """
        if self.option == INTEGER:
            write_integer_graph(_integer(source)[0], folder / FILE)
            card = _CARD.format(file=FILE, opset=OPSET, inputs=INPUT, outputs=OUTPUT)
            write_beside(source, folder, card)
            return
        with _silently(), preserve_global_rng():
            model: Any = source.loaded(torch.float32)
            model.set_attn_implementation("eager") if hasattr(model, "set_attn_implementation") else None
            given = _example(model)
            assert given is not None
            outputs = write_graph(model, given, folder / FILE, signed=self.option == "int8")
        card = _CARD.format(file=FILE, opset=OPSET, inputs=", ".join(given), outputs=", ".join(outputs))
        write_beside(source, folder, card)

    def verify(self, folder: Path, source: Source) -> Verified:
        """Codes in the file are compared, what onnxruntime makes of them, every layer, and the whole model's outputs.

        What can fail is each layer's own comparison (:mod:`nybble.export._onnx_judge`); the whole model's says how far
        codes that flipped took it. Of an integer graph logits are compared, which are equal bit for bit or not.
        """
        if self.option == INTEGER:
            network, images = _integer(source)
            compare_integer_graph(folder / FILE, network, images)
            products = sum(isinstance(step, Product) for step in network.steps)
            return Verified(opened_with=versions(), weights=products, exact_in="int32", cosine=1.0, largest=0.0)
        count = compare_weights(folder / FILE, source)
        model = source.loaded(torch.float32)
        given = _example(model)
        assert given is not None
        cosine, largest = compare_outputs(folder / FILE, model, given)
        judged = judge_layers(folder / FILE, model, given)
        return Verified(
            opened_with=versions(), weights=count, exact_in="float32", cosine=cosine, largest=largest,
            runtimes=_rows(source, self.takes), layerwise=asdict(judged),
        )  # fmt: skip


def _integer(source: Source) -> tuple[IntegerNetwork, Tensor]:
    """The integer network of a CNN, and two images."""
    model: Any = source.loaded(torch.float32)
    given = _example(model) or {}
    if list(given) != [INPUT]:
        raise ModelError(
            f"a {type(model).__name__} has no integer graph in ONNX: CNNs have one. Leave the option integer out for "
            "QDQ nodes."
        )
    return integer_network(model, given[INPUT]), given[INPUT]


def write_graph(model: nn.Module, given: Mapping[str, Tensor], path: Path, signed: bool = False) -> list[str]:
    """Write the file; returns the outputs' names.

    Args:
        model: with quantized layers, which are replaced; it gives a mapping to tensors.
        given: inputs by name, two of a batch.
        path: where to.
        signed: the option ``int8``.

    Raises:
        ModelError: the exporter can't trace this model.
    """
    name = type(model).__name__
    layers, weights = put_nodes(model, signed)
    traced = Traced(model, list(given)).eval()
    program = _export(traced, given, name)
    graph = program.model.graph
    mark_layers(graph, layers)
    program.model.metadata_props.clear()
    for layer, weight in weights.items():
        retype(graph, layer, weight)
    size = sum(t.numel() * t.element_size() for t in traced.state_dict().values())
    program.save(path, external_data=size > MOST)
    return traced.outputs


class Traced(nn.Module):
    """A model of named inputs as one of inputs in order, which gives its tensors in order.

    Args:
        model: gives a ``ModelOutput``. names: of the inputs.

    Attributes:
        outputs: names of what it gives, after it has been called.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.outputs: list[str] = []

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        found = self.model(**dict(zip(self.names, given, strict=True)))
        kept = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        self.outputs = list(kept)
        return tuple(kept.values())


def _check_kind(kind: Kind) -> None:
    if kind.operands:
        raise CannotError("the operands of attention", "--matmuls left out")
    if kind not in _KINDS:
        raise CannotError(f"a module of the kind {kind}", "linear layers, convolutions and embeddings")


def _whole_refused(model: Any, caches: bool = False) -> Refusal | None:
    """Why a model can't be held whatever its layers are; None: it can."""
    came = f"a {type(model).__name__}"
    if caches or model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        nearest = "encoders, vision models and CNNs; language models go to gguf, compressed-tensors or mlx"
        return Refusal(layers=("the model",), came=f"{came}, which generates token by token", nearest=nearest)
    if _example(model) is None:
        return Refusal(layers=("the model",), came=came, nearest="models of tokens or of images of one size")
    return None


def _check_layer(layer: Layer) -> None:
    _check_kind(layer.kind)
    for weight in layer.weights.values():
        form_of(weight)
    for side in (layer.inputs, layer.outputs):
        if side is not None:
            check_activation(side.quantizer)


def _example(model: Any) -> dict[str, Tensor] | None:
    """Inputs by name, two of a batch; None where none are known."""
    found = _inputs(model)
    if found is not None and "input_ids" in found and getattr(model.config, "type_vocab_size", 0) > 1:
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    return found


def _export(traced: Traced, given: Mapping[str, Tensor], name: str) -> Any:
    with torch.no_grad():
        traced(*given.values())
    free = {"input_ids": {0: "batch", 1: "tokens"}, "pixel_values": {0: "batch"}}
    shapes = [free.get(key, free["input_ids"]) for key in given]
    with warnings.catch_warnings(), reading(f"the graph of this {name} by torch.onnx.export", ModelError):
        warnings.simplefilter("ignore")
        dynamic = [dict.fromkeys(shape, torch.export.Dim.DYNAMIC) for shape in shapes]
        return torch.onnx.export(
            traced, tuple(given.values()), dynamo=True, opset_version=OPSET, input_names=list(given),
            output_names=traced.outputs, dynamic_shapes=(tuple(dynamic),), verbose=False,
        )  # fmt: skip


def _rows(source: Source, takes: tuple[Takes, ...]) -> tuple[Takes, ...]:
    """The rows that a model's weights are."""
    forms = {form_of(w).kind.lstrip("U") for layer in source.layers.values() for w in layer.weights.values()}
    rounded = any(layer.inputs for layer in source.layers.values())
    return tuple(
        row
        for row in takes
        if any(form.startswith(row.form.removeprefix("QDQ ")) for form in forms)
        and ("float8" in row.inputs or "int8" in row.inputs if rounded else "float" in row.inputs.split(", "))
    )


def _need(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f"target onnx needs {', '.join(missing)}: pip install 'nybble[onnx]'.")


PART = Onnx
