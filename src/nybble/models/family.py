"""A model family as data: its blocks, embeddings, what goes from block to block, and its fold pairs.

Nothing here computes anything with weights: transforms read the pairs, the walk reads the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nybble.core.errors import ModelError
from nybble.models.folds import LinearFold, NormFold, QueryKeyFold, holds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASE = "{base}"


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
        kept: names (``*`` stands for anything) of layers that stay in float with the head, by default: a scheme that
            doesn't ignore ``lm_head`` reaches them, too.
        units: classes of modules that a model of one block is learned by, where its data flow doesn't tell them
            (:mod:`nybble.calibration.units`).
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
    kept: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

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
            found = at(model, path)
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

    def keeps(self, name: str) -> bool:
        """Whether a layer of this name is one of :attr:`kept`."""
        return any(fnmatchcase(name, pattern) for pattern in self.kept)

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
        alive = [f for f in self.norm_folds if holds(f.when, config) and _has_weight(block, f.norm)]
        fitting = [f for f in alive if all(at(block, name) is not None for name in f.readers)]
        for fold in alive:
            fits = [f for f in fitting if f.norm == fold.norm]
            if not fits:
                raise ModelError(
                    f"adapter {self.name}: {fold.norm} of {type(block).__name__} is not read by {fold.readers}."
                )
        return fitting

    def linear_folds_of(self, block: nn.Module, config: PreTrainedConfig) -> list[LinearFold]:
        """The linear folds whose two modules this block has, under this config."""
        alive = [f for f in self.linear_folds if holds(f.when, config)]
        return [f for f in alive if at(block, f.first) is not None and at(block, f.second) is not None]

    def query_key_folds_of(self, block: nn.Module, config: PreTrainedConfig) -> list[QueryKeyFold]:
        """The query-key folds whose two modules this block has, with nothing but a rotary embedding between them."""
        return [
            fold
            for fold in self.query_key_folds
            if at(block, fold.query) is not None
            and at(block, fold.key) is not None
            and not any(at(block, name) is not None for name in fold.unless)
        ]

    def writers_of(self, block: nn.Module) -> list[str]:
        """The :attr:`writers` that a block has."""
        return [name for name in self.writers if at(block, name) is not None]

    def limits_of(self, config: PreTrainedConfig) -> list[str]:
        """:attr:`limits`, and the fold pairs that this config switches off, each with the reason."""
        off: list[str] = []
        folds: tuple[NormFold | LinearFold, ...] = (*self.norm_folds, *self.linear_folds)
        for fold in folds:
            if not holds(fold.when, config):
                name = fold.norm if isinstance(fold, NormFold) else f"{fold.first} -> {fold.second}"
                has = ", ".join(f"{key}={getattr(config, key, None)!r}" for key, _ in fold.when)
                off.append(f"{name} can't be folded with {has}")
        return [*self.limits, *off]


def under(path: str) -> str:
    """What the names of all that is in a module begin with; nothing for the model itself."""
    return f"{path}." if path else ""


def at(module: nn.Module, path: str) -> nn.Module | Tensor | None:
    """The submodule or parameter at a dotted path, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module | Tensor) else None


def _has_weight(block: nn.Module, name: str) -> bool:
    return isinstance(getattr(at(block, name), "weight", None), Tensor)
