"""What is known of a model family's structure, as data: blocks, embeddings, and which weights may be rescaled together.

An adapter never computes anything with weights. Transforms (SmoothQuant, weight equalisation, CBQ's pre-processing)
read its fold pairs; the pipeline reads its blocks. A model without an adapter still gets its blocks found
(:func:`generic_adapter`), and says what it can't offer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.core.registry import Registry
from nybble.nn.config import config_of
from nybble.nn.kinds import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Rows = Literal["all", "value_heads", "last_third", "third_of_each_head"]
Conditions = tuple[tuple[str, Any], ...]
BASE = "{base}"


@dataclass(frozen=True, kw_only=True)
class NormFold:
    """A norm and everything that reads its output, so a factor can move from one to the others.

    The norm multiplies channel c by ``offset + weight[c]`` (and adds ``bias[c]``): dividing both by s and multiplying
    input channel c of every reader by s changes nothing in float.

    ``readers``: names in the block; each is a module with a ``weight`` or a fused 3-D parameter. ``when``: config
    attributes that must have these values, else the norm's output also goes elsewhere and the pair is off.
    """

    norm: str
    readers: tuple[str, ...]
    offset: float = 0.0
    when: Conditions = ()


@dataclass(frozen=True, kw_only=True)
class LinearFold:
    """Two linears with only a per-channel (or positively homogeneous) step between them.

    Output rows of ``first`` against input channels of ``second``; ``rows`` says which row feeds which channel
    (:func:`feeding_rows`). ``heads``: attention is what lies between, which mixes tokens and leaves the channels of a
    head alone: inside a head they may be rotated and permuted, not from head to head. ``gates``: layers whose outputs
    meet those of ``first`` channel by channel, so that their rows are permuted along.
    """

    first: str
    second: str
    rows: Rows = "all"
    when: Conditions = ()
    heads: bool = False
    gates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QueryKeyFold:
    """Two linears whose outputs attention multiplies with each other: a channel of one over s, of the other times s.

    ``rows``: where queries and keys are among the rows, as in :class:`LinearFold`; ``value_heads``: several heads of
    queries may read one of keys. ``rotary``: a rotary embedding lies between, which mixes channel i of a head with
    channel i plus half of what it rotates: the two share a factor. ``unless``: modules of the block that would lie
    between, too, and are no such step (norms of queries and keys); with one of them the pair is off.
    """

    query: str
    key: str
    rows: Rows = "all"
    rotary: bool = False
    unless: tuple[str, ...] = ()


ROTARY_QUERY_KEY = QueryKeyFold(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    rows="value_heads",
    rotary=True,
    unless=("self_attn.q_norm", "self_attn.k_norm"),
)
"""Of llama and all that call their layers as it does."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A tensor that goes from block to block beside the hidden states: T5's position bias, a second stream of tokens.

    ``name``: its own. ``gives``: its place in the tuple that blocks return (the hidden states are at the first place
    that no flow has). ``takes``: where a block gets it: a place among the arguments behind the hidden states, or a
    keyword. ``once``: the first block alone makes it, and all later ones get it; else every block does both.
    """

    name: str
    gives: int
    takes: int | str
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A model family.

    Attributes:
        name: the registry's key.
        model_types: values of ``config.model_type`` that it describes.
        blocks: path of the ``nn.ModuleList`` of repeated blocks; of an encoder-decoder the encoder's. ``{base}`` in
            paths is the bare model's place under a head (``bert.``), or nothing; :func:`adapter_for` fills it in.
        decoder_blocks: path of the decoder's blocks, which read the encoder's output; None without one.
        embeddings: paths of the input embeddings (tokens, learned positions).
        final_norm: path of the norm after the last block; None if unknown or absent.
        head: path of the output projection; None if unknown.
        norm_folds, linear_folds: fold pairs, names relative to a block. Where blocks differ (dense and sparse ones),
            the pairs whose names a block doesn't have are for the other kind.
        query_key_folds: pairs of queries and keys, names relative to a block, as far as the block has them.
        writers: what adds its output to the hidden states that go from block to block, names relative to a block; of
            families alone whose norms are RMS norms (so that these states may be rotated). Where blocks differ, those
            that a block doesn't have are for the other kind.
        experts: path, within a block, of the module with fused 3-D expert weights.
        renames: leading part of a tensor's name in older checkpoints -> its name now.
        limits: what the adapter can't offer, each with its reason.
        flows: what goes from block to block beside the hidden states.
        reads: key of the kind of data that calibration feeds it, in the registry ``nybble.data.kinds``: ``tokens``,
            windows of running text; ``sentences``, padded and with the tokenizer's special tokens; ``pairs``, inputs
            and targets; ``images``. Which kind of text it is depends on the class (:func:`reads_of`).
        convolutional: whether the layers to quantize are convolutions. ``blocks`` is then the path of the network
            itself, which is one block: its stages differ in shape, and it is small.
        whole: why the model can't be walked from block to block; all of it is then one block, called as the model is,
            and ``blocks`` is empty. Else nothing.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: tuple[str, ...]
    final_norm: str | None
    head: str | None
    norm_folds: tuple[NormFold, ...] = ()
    linear_folds: tuple[LinearFold, ...] = ()
    query_key_folds: tuple[QueryKeyFold, ...] = ()
    writers: tuple[str, ...] = ()
    decoder_blocks: str | None = None
    experts: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    limits: tuple[str, ...] = ()
    flows: tuple[Flow, ...] = ()
    reads: str = "tokens"
    convolutional: bool = False
    whole: str = ""

    @property
    def offers(self) -> frozenset[str]:
        """Which kinds of knowledge are here: ``blocks``, ``norm_folds``, ``linear_folds``, ``experts``."""
        parts = {"norm_folds": self.norm_folds, "linear_folds": self.linear_folds, "experts": self.experts}
        return frozenset({"blocks", *(name for name, part in parts.items() if part)})

    @property
    def stacks(self) -> tuple[str, ...]:
        """Paths of the lists of blocks, in the order in which they are called."""
        return (self.blocks,) if self.decoder_blocks is None else (self.blocks, self.decoder_blocks)

    def stack_names(self, model: nn.Module) -> list[list[str]]:
        """Full names of the blocks, ``model.layers.3``, for each list of them.

        Raises:
            ModelError: a path leads nowhere, so the model isn't what its config says.
        """
        if self.whole:
            return [[""]]
        names = []
        for path in self.stacks:
            found = _at(model, path)
            if self.convolutional and isinstance(found, nn.Module):
                names.append([path])
                continue
            if not isinstance(found, nn.ModuleList) or not len(found):
                raise ModelError(f"{type(model).__name__} has no blocks at {path!r} (adapter {self.name}).")
            names.append([f"{path}.{index}" for index in range(len(found))])
        return names

    def block_names(self, model: nn.Module) -> list[str]:
        """Full names of all blocks."""
        return [name for names in self.stack_names(model) for name in names]

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """All blocks; raises as :meth:`stack_names`."""
        return [model.get_submodule(name) for name in self.block_names(model)]

    def inside(self, name: str) -> bool:
        """Whether a parameter or module of this name is in a block."""
        return name.startswith(tuple(under(path) for path in self.stacks))

    def outside(self, model: nn.Module) -> list[str]:
        """Names of the stored tensors that are in no block: embeddings, final norm, head, projections between them."""
        return [name for name in model.state_dict() if not self.inside(name)]

    def tied_groups(self, model: nn.Module) -> list[tuple[str, ...]]:
        """Groups of parameter names that share one tensor."""
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def norm_folds_of(self, block: nn.Module, config: PreTrainedConfig) -> list[NormFold]:
        """The norm folds that hold in this block under this config.

        Raises:
            ModelError: the block has a fold's norm, and no listed set of readers fits it: the adapter is out of date.
        """
        alive = [f for f in self.norm_folds if _holds(f.when, config) and _has_weight(block, f.norm)]
        fitting = [f for f in alive if all(_at(block, name) is not None for name in f.readers)]
        for fold in alive:
            fits = [f for f in fitting if f.norm == fold.norm]
            if not fits:
                raise ModelError(
                    f"adapter {self.name}: {fold.norm} of {type(block).__name__} is not read by {fold.readers}."
                )
        return fitting

    def linear_folds_of(self, block: nn.Module, config: PreTrainedConfig) -> list[LinearFold]:
        """The linear folds whose two modules this block has, under this config."""
        alive = [f for f in self.linear_folds if _holds(f.when, config)]
        return [f for f in alive if _at(block, f.first) is not None and _at(block, f.second) is not None]

    def query_key_folds_of(self, block: nn.Module, config: PreTrainedConfig) -> list[QueryKeyFold]:
        """The query-key folds whose two modules this block has, with nothing but a rotary embedding between them."""
        return [
            fold
            for fold in self.query_key_folds
            if _at(block, fold.query) is not None
            and _at(block, fold.key) is not None
            and not any(_at(block, name) is not None for name in fold.unless)
        ]

    def writers_of(self, block: nn.Module) -> list[str]:
        """The :attr:`writers` that a block has."""
        return [name for name in self.writers if _at(block, name) is not None]

    def limits_of(self, config: PreTrainedConfig) -> list[str]:
        """:attr:`limits`, and the fold pairs that this config switches off, each with the reason."""
        off: list[str] = []
        folds: tuple[NormFold | LinearFold, ...] = (*self.norm_folds, *self.linear_folds)
        for fold in folds:
            if not _holds(fold.when, config):
                name = fold.norm if isinstance(fold, NormFold) else f"{fold.first} -> {fold.second}"
                has = ", ".join(f"{key}={getattr(config, key, None)!r}" for key, _ in fold.when)
                off.append(f"{name} can't be folded with {has}")
        return [*self.limits, *off]


def under(path: str) -> str:
    """What the names of all that is in a module begin with; nothing for the model itself."""
    return f"{path}." if path else ""


def _at(module: nn.Module, path: str) -> nn.Module | Tensor | None:
    """The submodule or parameter at a dotted path, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module | Tensor) else None


def _has_weight(block: nn.Module, name: str) -> bool:
    return isinstance(getattr(_at(block, name), "weight", None), Tensor)


def _holds(when: Conditions, config: PreTrainedConfig) -> bool:
    return all(getattr(config, key, None) == value for key, value in when)


def feeding_rows(fold: LinearFold, config: PreTrainedConfig, channels: int) -> Tensor:
    """Which output row of ``fold.first`` feeds each input channel of ``fold.second``.

    Args:
        fold: the pair.
        config: the model's, for its heads.
        channels: number of input channels of ``second``.

    Returns:
        int64 ``[channels]``. With grouped-query attention several channels name the same row: a factor must be one per
        row, and is spread over the channels by this index.
    """
    index = torch.arange(channels)
    if fold.rows == "all":
        return index
    if fold.rows == "last_third":  # one projection for [q | k | v]
        return index + 2 * channels
    heads: int = config.num_attention_heads
    width = channels // heads
    head, within = index // width, index % width
    if fold.rows == "third_of_each_head":  # [q0 | k0 | v0 | q1 | k1 | v1 | ...]
        return head * 3 * width + 2 * width + within
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    return head // (heads // kv_heads) * width + within


def query_key_rows(
    fold: QueryKeyFold, config: PreTrainedConfig, queries: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Which rows make the channels of queries and keys, and which free factor each has.

    Args:
        fold: the pair.
        config: the model's, for its heads and for how much of each its rotary embedding rotates.
        queries: rows of ``fold.query``.

    Returns:
        Of queries and of keys (rows, units): int64 [channels] each. Channel by channel of a key head, in all query
        heads that read it, the unit is one; so it is of the two that a rotary embedding mixes.
    """
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    kv_heads = heads if fold.rows != "value_heads" else kv_heads
    fused = fold.rows not in ("all", "value_heads")
    width = queries // heads // (3 if fused else 1)
    within = torch.arange(width)
    unit = within
    if fold.rotary:
        half = int(width * _rotated(config)) // 2
        unit = torch.where(within < 2 * half, within % max(1, half), within - half)
    per_head = int(unit.max()) + 1

    def side(many: int, offset: int) -> tuple[Tensor, Tensor]:
        head = torch.arange(many)[:, None]
        if fold.rows == "third_of_each_head":
            rows = head * 3 * width + offset * width + within
        else:
            rows = head * width + within + (offset * heads * width if fold.rows == "last_third" else 0)
        return rows.flatten(), (head // (many // kv_heads) * per_head + unit).flatten()

    return side(heads, 0), side(kv_heads, int(fused))


def _rotated(config: PreTrainedConfig) -> float:
    """The share of a head's channels that a rotary embedding rotates."""
    found = getattr(config, "rope_parameters", None) or {}
    share: float = found.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return share


REGISTRY = Registry("nybble.models.adapters", "model family", lambda part: isinstance(part, Adapter))


@cache
def _by_model_type() -> dict[str, Adapter]:
    parts: Iterable[Adapter] = REGISTRY.all().values()
    return {model_type: adapter for adapter in parts for model_type in adapter.model_types}


def checkpoint_renames(config: PreTrainedConfig) -> Mapping[str, str]:
    """Renamed parts of tensor names in this family's older checkpoints; empty for unknown families."""
    found = _by_model_type().get(config.model_type)
    return dict(found.renames) if found else {}


TEXTS = frozenset({"tokens", "sentences", "pairs"})
"""Kinds of data that are text: which of them a model reads, its class tells better than its family."""


def reads_of(model: nn.Module) -> str:
    """Key of the kind of data that a model is calibrated and judged on: its family's, and of text what its class takes.

    Text goes into a decoder with a language head as it runs, into an encoder-decoder as inputs and targets, and into
    all others (encoders, and whatever has no head or another one) as sentences.
    """
    found = _by_model_type().get(getattr(config_of(model), "model_type", ""))
    return _reads(model, "tokens" if found is None else found.reads)


def _reads(model: nn.Module, usual: str) -> str:
    main, generates = getattr(model, "main_input_name", None), getattr(model, "can_generate", None)
    if usual not in TEXTS or generates is None:
        return usual
    if main != "input_ids":
        return "images" if main == "pixel_values" else usual
    bare = getattr(model, "base_model", None) is model
    if (bare or generates()) and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return "pairs"  # with a classifier they make the decoder's inputs of the encoder's
    return "tokens" if generates() else "sentences"


def adapter_for(model: nn.Module | PreTrainedConfig) -> Adapter:
    """The adapter of a model (or of its config), or a generic one made by looking at the model.

    Raises:
        ModelError: only a config was given and its model type has no adapter; or no repeated blocks were found; or a
            convolutional network without its head.
    """
    config = config_of(model) if isinstance(model, nn.Module) else model
    found = _by_model_type().get(getattr(config, "model_type", ""))
    if found is not None and isinstance(model, nn.Module):
        fitted, reads = _fitted(found, model), _reads(model, found.reads)
        return fitted if reads == found.reads else replace(fitted, reads=reads)
    if found is not None:
        return found
    if not isinstance(model, nn.Module):
        known = ", ".join(sorted(_by_model_type()))
        raise ModelError(f"no adapter for model type {model.model_type!r}; known: {known}. Pass the model itself.")
    return generic_adapter(model)


def _fitted(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with its paths as this class has them (``bert.encoder.layer`` under a head)."""
    if adapter.decoder_blocks is not None and "{" not in adapter.blocks and _at(model, adapter.decoder_blocks) is None:
        return replace(adapter, decoder_blocks=None)  # the encoder alone
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    if BASE not in adapter.blocks:
        if not base and adapter.blocks.startswith(f"{prefix}."):
            return _moved(adapter, f"{prefix}.", "")  # the bare model
        usual = f"{adapter.blocks.partition('.')[0]}."
        other = base and base != usual and _at(model, adapter.blocks) is None
        return _moved(adapter, usual, base) if other else adapter  # LlamaForQuestionAnswering calls it "transformer"
    if adapter.convolutional:
        if not base:
            raise ModelError(f"{type(model).__name__} is quantized with its head: load a {adapter.name} classifier.")
        return replace(adapter, blocks=prefix)

    def fit(path: str | None) -> str | None:
        return None if path is None else path.replace(BASE, base)

    blocks, decoder = adapter.blocks.replace(BASE, base), fit(adapter.decoder_blocks)
    if decoder is not None and _at(model, blocks) is None:
        blocks, decoder = decoder, None  # the decoder alone
    elif decoder is not None and _at(model, decoder) is None:
        decoder = None  # the encoder alone
    return replace(
        adapter,
        blocks=blocks,
        decoder_blocks=decoder,
        embeddings=tuple(path.replace(BASE, base) for path in adapter.embeddings),
        final_norm=fit(adapter.final_norm),
    )


def _moved(adapter: Adapter, prefix: str, to: str) -> Adapter:
    """The adapter of a decoder for a class without its language head, which has the base model elsewhere."""

    def moved(path: str) -> str:
        return f"{to}{path.removeprefix(prefix)}" if path.startswith(prefix) else path

    return replace(
        adapter,
        blocks=moved(adapter.blocks),
        embeddings=tuple(map(moved, adapter.embeddings)),
        final_norm=None if adapter.final_norm is None else moved(adapter.final_norm),
        head=None,
    )


def _of_text(model: nn.Module, lists: Sequence[tuple[str, nn.Module]]) -> Sequence[tuple[str, nn.Module]]:
    """The lists in the part of a model that reads text, where there are others: a tower of images may be deeper."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    parts = [name for name, module in model.named_modules() if name and module is decoder]
    parts += [name for name, _ in model.named_modules() if name.endswith(("language_model", "text_model"))]
    for part in parts:
        if inside := [item for item in lists if item[0].startswith(f"{part}.")]:
            return inside
    return lists


def _longest(lists: Sequence[tuple[str, nn.Module]]) -> str:
    """The path of the longest list of blocks of one class, else of several; of equals the one that is nested least."""
    alike = [(name, module) for name, module in lists if len({type(block) for block in module.children()}) == 1]
    return max(alike or lists, key=lambda item: (len(item[1]), -item[0].count(".")))[0]  # type: ignore[arg-type]


def _multiplies(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.by_rows


def generic_adapter(model: nn.Module) -> Adapter:
    """An adapter for an unknown model: its blocks are the longest list of modules with matmuls inside, alike if it can.

    Without such a list the whole model is one block. It knows no fold pairs; :attr:`Adapter.limits` says so.

    Raises:
        ModelError: nothing in the model is of a kind that can be quantized.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not any(isinstance(block, nn.ModuleList) for block in module)
        and all(any(_multiplies(part) for part in block.modules()) for block in module)
    ]
    if not lists:
        _check_kinds(model)
        return whole_adapter(model, f"{type(model).__name__} has no list of repeated blocks")
    reads = _reads(model, "tokens")
    path, decoder = _longest(_of_text(model, lists) if reads in TEXTS else lists), None
    if reads == "pairs":
        sides = [[item for item in lists if side in item[0].split(".")] for side in ("encoder", "decoder")]
        if all(sides):
            path, decoder = (_longest(side) for side in sides)
    embeddings = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and not n.startswith(path))
    limits = _no_folds(f"{type(model).__name__} has no adapter")
    return Adapter(
        name="generic", model_types=(), blocks=path, embeddings=embeddings, final_norm=None,
        decoder_blocks=decoder, reads=reads, head=_head(model), limits=limits,
    )  # fmt: skip


def _check_kinds(model: nn.Module) -> None:
    """Refuse a model most of whose matrices are in layers that no kind knows: what could be quantized is the rest."""
    known, unknown, classes = 0, 0, dict[str, None]()
    for module in model.modules():
        weight, kind = module._parameters.get("weight"), kind_of(module)
        if kind is not None and kind.shares_input:
            known += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        elif kind is None and weight is not None and weight.ndim > 1:
            unknown += weight.numel()
            classes[type(module).__name__] = None
    if not known or unknown > known:
        own = f"multiplies in layers of its own ({', '.join(classes)})" if classes else "has no layer that multiplies"
        raise ModelError(
            f"{type(model).__name__} {own}, and nybble knows no kind of module for that. Quantize a model of the "
            "family that it comes from, or add a kind (an entry point of the group nybble.nn.kinds)."
        )


def whole_adapter(model: nn.Module, why: str) -> Adapter:
    """An adapter under which all of a model is one block; ``why`` it can't be walked block by block, for people."""
    return Adapter(
        name="whole", model_types=(), blocks="", embeddings=(), final_norm=None, head=_head(model),
        reads=reads_of(model), limits=_no_folds(why), whole=why,
    )  # fmt: skip


def _head(model: nn.Module) -> str | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return None if head is None else next((n for n, m in model.named_modules() if m is head), None)


def _no_folds(why: str) -> tuple[str, ...]:
    return (
        f"transforms that fold a norm into linears (SmoothQuant, ...) are off: {why}",
        f"transforms that fold a linear into a linear (equalisation, ...) are off: {why}",
    )
