"""What others' runtimes load: one target a file.

A target answers five questions, and says as data what it takes:

=============  =========================================================================================
``constrain``  a scheme, before anything is quantized -> the one whose result the target holds bit for bit
``check``      a quantized model -> what of it the target can't hold, and the nearest that it does
``write``      a quantized model -> files in a folder, one tensor in memory at a time
``verify``     those files, opened as their users open them -> equal to the last bit, or an error
``rounds``     weights that ``write`` would round again, as the option asks -> to what; most targets round nothing
``takes``      format x granularity x inputs, and the runtime's first version that loads it, with its source
=============  =========================================================================================

A new one is a file here, or an entry point of the group ``nybble.export`` in another package. ``PART`` is a subclass of
:class:`ExportTarget`; its name is what ``--target`` says, and what stands behind a colon (``gguf:q4_k_m``) its option.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nybble.core.errors import ModelError, UsageError
from nybble.core.registry import Registry
from nybble.recipes import USUAL

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from nybble.export._source import Layer, Source
    from nybble.models.sources.layouts._ct_args import CannotError
    from nybble.nn.kinds import Target
    from nybble.quantizer import Quantizer
    from nybble.scheme import Scheme

_LISTED = 4


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Layers that a target can't hold.

    Attributes:
        layers: their names. came: what they are, in words of a quantizer line. nearest: what the target takes instead.
        why: what is wrong, where ``came`` doesn't say it.
    """

    layers: tuple[str, ...]
    came: str
    nearest: str
    why: str = ""

    def __str__(self) -> str:
        names = ", ".join(self.layers[:_LISTED])
        if len(self.layers) > _LISTED:
            names += f" and {len(self.layers) - _LISTED} more"
        return f"{names}: {self.came}{f' ({self.why})' if self.why else ''}; it takes {self.nearest}"


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A tensor that is rounded, or cast, while it is written.

    Attributes:
        name: of the module, or of the parameter where that is no weight. came: what it is. to: what it becomes.
    """

    name: str
    came: str
    to: str


@dataclass(frozen=True, kw_only=True)
class Takes:
    """A row of what a target takes: data for a page, and for ``--check``.

    Attributes:
        weights, inputs: quantizer lines, or words for a family of them; ``float`` where they stay so.
        form: what the files call it. runtime: who loads it. since: its first version that does, or the change that
            brought it; empty where nothing shows one. source: what shows it. note: limits.
    """

    weights: str
    inputs: str
    form: str
    runtime: str
    since: str
    source: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What is made for a target where nobody says what: by the recipe ``best``, over a scheme that the target holds.

    Attributes:
        best: of the family of best recipes the one whose steps, and scheme, are taken.
        weights: a quantizer line in place of that scheme's weights, with inputs in float; empty keeps the scheme.
        option: what then stands behind the target's colon.
    """

    best: str = USUAL
    weights: str = ""
    option: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model before it is quantized.

    Attributes:
        config: of config.json. dtype: of what stays in float. targets: name -> what a scheme may quantize.
        classes: name -> the class names that a target answers to. model: float, possibly on the meta device.
        tokenizer: of the model, that there may be none of; read when it is called.
        without_place: those for which checkpoints of plain matrices have no place, name -> why.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype
    targets: Mapping[str, Target]
    classes: Mapping[str, Sequence[str]]
    model: nn.Module
    tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None
    without_place: Mapping[str, CannotError] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What opening the files showed.

    Attributes:
        opened_with: names and versions of the libraries that opened them.
        weights: quantized weights compared, every one equal. exact_in: the dtype in which they are.
        cosine, largest: of the logits to nybble's: cosine similarity, and largest difference over the largest logit;
            None where the model could not be called (``uncalled`` says why).
        runtimes: rows of ``takes`` that these files are.
        layerwise: what comparing layer by layer showed, name -> number; empty where that was not done.
    """

    opened_with: Mapping[str, str]
    weights: int
    exact_in: str
    cosine: float | None
    largest: float | None
    uncalled: str = ""
    runtimes: Sequence[Takes] = field(default_factory=tuple)
    layerwise: Mapping[str, float] = field(default_factory=dict)


class ExportTarget(ABC):
    """Where a quantized model may go.

    Args:
        option: what stands behind the colon; empty for none.

    Attributes:
        errors: name of a :class:`Cast` -> ``|W - W'|^2 / |W|^2``, which :meth:`write` finds.
        summary: what it is, in a line.
        options: what may stand behind the colon, word -> meaning; a target without any takes none.
        takes: what it holds, and who loads that.
        in_float: whether a model without a quantized layer can go there.
        from_float: whether ``nybble export`` takes models for it that nobody quantized.
        loses: what its files never keep, in words; empty where what can't be kept is refused.
        usual: what is made for it where no recipe and no scheme is named.
        rotates: whether its files can say that a layer's input is rotated while the model runs.
        drops_rounding: whether activations are in float there whatever they were.
        at_once: ``nybble quantize --target`` writes the files too, beside its own, into a folder of the target's name.
    """

    summary: ClassVar[str]
    in_float: ClassVar[bool] = False
    from_float: ClassVar[bool] = False
    loses: ClassVar[str] = ""
    options: ClassVar[Mapping[str, str]] = {}
    takes: ClassVar[tuple[Takes, ...]] = ()
    usual: ClassVar[Usual] = Usual()
    rotates: ClassVar[bool] = False
    drops_rounding: ClassVar[bool] = False
    at_once: ClassVar[bool] = False

    def __init__(self, option: str = "") -> None:
        self.option = option
        self.errors: dict[str, float] = {}

    def require(self, check: bool) -> None:  # noqa: B027  (most targets need nothing that nybble doesn't bring)
        """Refuse at once where a library is missing.

        Args:
            check: whether what opens the files is needed too, beside what writes them.

        Raises:
            UsageError: it is missing or too old; the message has the line that installs it.
        """

    @abstractmethod
    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:
        """The scheme whose result the target holds exactly: the same values where it can, told in other parameters.

        Scales' dtypes, how an outer scale is kept, which layers share one are changed; a format or a group size is not.

        Raises:
            SchemeError: a rule asks for what the target can't hold; names the nearest. ModelError: no scheme would do:
                the target can't hold this model, or its tokenizer.
        """

    @abstractmethod
    def check(self, source: Source) -> list[Refusal]:
        """What of a quantized model can't be written; headers and small tensors are read, no weight."""

    def notes(self, source: Source) -> list[str]:
        """What will be lost or done otherwise though the files are right, a line each."""
        return []

    def rounds(self, source: Source) -> Mapping[str, Quantizer]:
        """Layers whose weights :meth:`write` rounds again because the option asks for that, and to what."""
        return {}

    def casts(self, source: Source) -> list[Cast]:
        """What :meth:`write` rounds or casts beside :meth:`rounds`: floats above all; values may stay."""
        return []

    def shifts(self, source: Source) -> list[Refusal]:
        """Layers that :meth:`write` takes as they are, though a float32's last bit of their values moves there."""
        return []

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Write the files into an empty folder, after :meth:`check`.

        Raises:
            FileError: the source can't be read, or the disk is full.
        """

    @abstractmethod
    def verify(self, folder: Path, source: Source) -> Verified:
        """Open what was written as its users do, and compare.

        Raises:
            FileError: it doesn't open, or a weight differs. UsageError: a library that opens it is missing.
        """


REGISTRY = Registry(
    "nybble.export", "export target", lambda part: isinstance(part, type) and issubclass(part, ExportTarget)
)


def is_target(text: str) -> bool:
    """Whether this names a target, with or without an option; nothing is imported."""
    return text.partition(":")[0].lower() in REGISTRY


def get_target(text: str) -> ExportTarget:
    """A target as it is named: ``dense``, ``dense:float16``.

    Raises:
        UsageError: no such target, or no such option (the message has the closest).
    """
    from nybble.core.errors import did_you_mean

    name, colon, option = text.partition(":")
    part: type[ExportTarget] = REGISTRY.get(name.lower())
    option = option.lower()
    if colon and not part.options:
        raise UsageError(f"target {text!r}: {name} takes nothing behind a colon.")
    if colon and option not in part.options:
        raise UsageError(f"target {text!r}: unknown option {option!r}.{did_you_mean(option, part.options)}")
    return part(option)


def check_source(folder: Path, target: str) -> None:
    """Refuse a folder that isn't a quantized model, unless its target takes any; only then is the target imported.

    Args:
        folder: of the model.
        target: its name, with its option; empty for what the folder says.

    Raises:
        FileError: nothing of that kind is there. UsageError: no such target.
    """
    from nybble.checkpoint.marked import check_readable, is_others, is_quantized
    from nybble.core.files import check_folder

    check_folder(folder)
    if target and not is_quantized(folder) and not is_others(folder) and get_target(target).from_float:
        return
    check_readable(folder)


def refusals(part: ExportTarget, source: Source) -> list[Refusal]:
    """All that a target can't write of a model: what it says itself, of layers that it can be asked about."""
    rotated = tuple(name for name, layer in source.layers.items() if layer.kind.unrotated is not layer.kind)
    relearned = tuple(name for name, layer in source.layers.items() if _relearned(layer))
    ours = tuple(name for name, layer in source.layers.items() if layer.kind.ours_alone)
    found, why = [], "the file has no words for it"
    if ours:
        found.append(Refusal(layers=ours, came="one layer for queries and keys", nearest=APART, why=why))
    if rotated and not part.rotates:
        found.append(Refusal(layers=rotated, came="an online rotation of its input", nearest=UNROTATED, why=why))
    if relearned and not part.drops_rounding:
        found.append(Refusal(layers=relearned, came="learned thresholds of activations", nearest=UNSHIFTED, why=why))
    return found or part.check(source)


def _relearned(layer: Layer) -> bool:
    """Whether what activations are rounded to is decided by thresholds that were learned."""
    return any(side is not None and side.relearned for side in (layer.inputs, layer.outputs))


UNSHIFTED = (
    "activations learned without (lsq; elastic: threshold: none), or --target dense, which leaves activations unrounded"
)
APART = "a model trained with query_key: false; with nybble installed transformers loads this one as it is"
UNROTATED = (
    "layers without: --target dense folds it into float weights, and without the step online-rotation there is none "
    "(rotate and hadamard are folded too)"
)


def refuse(name: str, refusals: Sequence[Refusal], way_out: str = "") -> None:
    """Raise ModelError with all that a target can't hold, if there is anything.

    Args:
        name: of the target.
        refusals: what it can't hold.
        way_out: what to do then; by default to quantize for it.
    """
    if refusals:
        lines = "\n  ".join(map(str, refusals))
        usual = f"Quantize with --target {name}, which keeps to what it holds, or choose another target."
        raise ModelError(f"target {name} can't hold this model as it is:\n  {lines}\n{way_out or usual}")
