"""What a kind of module says of itself; everything above asks these questions and never for a module's class."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import GranularityError, ModelError, SchemeError
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned
from nybble.nn.activation import ActivationQuantizer, check_static
from nybble.nn.layouts import Layouts
from nybble.nn.twin import Twin
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer
from nybble.scheme import Rule

Get = Callable[[str], Tensor]
"""Gives a parameter of a module by its name there: the live one, or the source's own in full precision."""
Operands = tuple[tuple[str, Tensor], tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that a scheme can quantize: a module's weight, a fused parameter, the operands of an attention.

    Attributes:
        name: of the module; of a fused parameter the module's and ``leaf``.
        kind: what it is. shape: [out, in] of a matrix of it; (0, 0) without one.
        leaf: name of the parameter in the module, where a module has several targets.
        matrices: how many it has; 0 of an attention, whose targets are products of activations.
        groups: of a convolution; each sees other columns of the input.
        rule: what the scheme does with it; nothing, until it is planned.
        head: the output head that reads the same table (:meth:`Kind.tied`). shares: other embeddings that do.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    leaf: str = ""
    matrices: int = 1
    groups: int = 1
    rule: Rule = field(default_factory=Rule)
    head: str = ""
    shares: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module that has it."""
        return self.name.removesuffix(f".{self.leaf}") if self.leaf else self.name

    @property
    def parameters(self) -> tuple[str, ...]:
        """Full names of the parameters that its matrices are made of."""
        return tuple(f"{self.module}.{name}" for name in self.kind.parameters(self.leaf))


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What takes a target's place.

    Attributes:
        weights: a QTensor [out, in] for each of its matrices; none where they stay in float.
        inputs, outputs: of what enters and leaves the module. operands: of an attention's products, by name.
        folded: full name of a BatchNorm that is in weight and bias now.
    """

    weights: Sequence[QTensor] = ()
    inputs: ActivationQuantizer | None = None
    outputs: ActivationQuantizer | None = None
    operands: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    folded: str = ""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A tensor of a target that is rounded, and whose rounding can be learned.

    Attributes:
        name: ``weights``, ``inputs``, ``outputs``, ``matmuls.query``, ``kv.keys`` ...
        quantizer: of it.
        example: of a shape that a granularity can judge by; of a weight the matrix itself.
    """

    name: str
    quantizer: Quantizer
    example: Tensor

    @property
    def role(self) -> str:
        """The key of a rule that says how it is rounded: the name before a dot."""
        return self.name.partition(".")[0]

    @property
    def side(self) -> str:
        """What a learned part calls it."""
        return WEIGHTS if self.role == WEIGHTS else ACTIVATIONS


@dataclass(frozen=True)
class Stored:
    """What quantized modules keep in a file, by the tensors' full names.

    Attributes:
        tensors: name -> (dtype, shape). roles: name -> codes, scales, offsets or tables.
        elements: name of a quantized weight -> how many it has. padding: name -> bytes that packing wastes.
        weights: the weights themselves, described or filled. notes: name of a quantized weight -> words on where it
            stands, for ``inspect``.
    """

    tensors: dict[str, tuple[torch.dtype, list[int]]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)
    weights: dict[str, QTensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def tables(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Count what is neither code nor scale under ``prefix``."""
        self._add(prefix, tensors, dict.fromkeys(tensors, "tables"))

    def weight(self, prefix: str, qtensor: QTensor) -> None:
        """Count a packed weight under ``prefix``."""
        self.elements[prefix] = math.prod(qtensor.shape)
        self.weights[prefix] = qtensor
        self._add(prefix, qtensor.tensors(), qtensor.roles())
        wasted = qtensor.padding_bytes().get("codes", 0)
        if wasted:
            self.padding[f"{prefix}.codes"] = wasted

    def activations(self, prefix: str, quantizer: ActivationQuantizer) -> None:
        """Count the parameters of a static quantizer of activations under ``prefix``."""
        self._add(prefix, quantizer.state_dict(), quantizer.roles())

    def _add(self, prefix: str, tensors: Mapping[str, Tensor], roles: Mapping[str, str]) -> None:
        for key, tensor in tensors.items():
            self.tensors[f"{prefix}.{key}"] = (tensor.dtype, list(tensor.shape))
            self.roles[f"{prefix}.{key}"] = roles[key]


class Kind(ABC):
    """One kind of module: what it is in float, what it becomes, how a file describes it.

    A kind holds no state. Modules are those of any model, weights possibly on the meta device; parameters keep their
    own dtypes.

    Attributes:
        entry: its class in a checkpoint's descriptions, which files keep for ever.
        classes: names beside a module's own class that a scheme's targets may use. sides: what a rule may quantize of
            it. refusal: what is said to a rule that asks for another side.
        stand_ins: classes of its quantized modules. reads_another: they read another quantized module, so that one is
            restored before.
        shares_input: it multiplies one tensor, which other modules may read as well. fused: its matrices are kept in
            one parameter, and each reads rows of its own (:meth:`routed`).
        by_rows: [..., in] becomes [..., out], each row by itself. channels_first: [images, channels, ...] comes out, so
            a BatchNorm may be folded in and the mean of each channel corrected.
        rows_a_sample: how many rows calibration takes of a sample at most; 0 where each token is one.
        ours_alone: a model has it only where nybble put it, so files for others can't hold it.
        operands: names of the activations that it multiplies with each other. part: name of the submodule that rounds
            them.
    """

    entry: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    sides: ClassVar[tuple[str, ...]]
    refusal: ClassVar[str]
    stand_ins: ClassVar[tuple[type[nn.Module], ...]]
    reads_another: ClassVar[bool] = False
    shares_input: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    channels_first: ClassVar[bool] = False
    rows_a_sample: ClassVar[int] = 0
    ours_alone: ClassVar[bool] = False
    operands: ClassVar[tuple[str, ...]] = ()
    part: ClassVar[str] = ""

    @property
    def unrotated(self) -> Kind:
        """The kind of the same module without a rotation of its input; itself where there is none.

        Its matrix is by the channels of what the module is called with: what transforms rewrite.
        """
        return self

    def __repr__(self) -> str:
        return self.entry

    # ---- what it is
    @abstractmethod
    def claims(self, module: nn.Module) -> bool:
        """Whether this float module is of the kind; one module, one kind (those of other packages are asked first)."""

    def resembles(self, module: nn.Module) -> bool:
        """Whether it looks like one of the kind; what the kind doesn't claim all the same computes something else.

        Such modules stay in float and are named where a scheme asks for them.
        """
        return False

    def class_names(self, module: nn.Module, convolutional: bool = False) -> tuple[str, ...]:
        """Names that a scheme's target may use, its class first; ``convolutional``: the model is such a network."""
        own = type(module).__name__
        return own, *(name for name in self.classes if name != own)

    def targets(self, name: str, module: nn.Module) -> Iterator[Target]:
        """What a scheme can quantize of the module called ``name``."""
        rows, columns = self.matrix(module, "", live(module)).shape
        yield Target(name=name, kind=self, shape=(rows, columns))

    def check(self, target: Target, module: nn.Module) -> None:
        """Raise where a planned target's rule asks for what the kind can't do.

        Raises:
            SchemeError: another side, or a quantizer of activations that it can't take. GranularityError: a width that
                a granularity doesn't divide.
        """
        rule = target.rule
        for side in ("weights", "inputs", "outputs", "matmuls", "kv"):
            if getattr(rule, side) is not None and side not in self.sides:
                raise SchemeError(self.refusal)
        rows, columns = target.shape
        for quantizer, width in ((rule.inputs, columns), (rule.outputs, rows)):
            if quantizer is None:
                continue
            check_static(quantizer)
            self.check_activations(quantizer)
            try:
                quantizer.granularity.check((1, 8, width))
            except GranularityError as error:
                raise GranularityError(f"activations: {error}") from error

    def check_activations(self, quantizer: Quantizer) -> None:  # noqa: B027 (most can have any)
        """Raise SchemeError for a quantizer that what enters and leaves the module can't have."""

    def tied(self, target: Target, root: nn.Module, others: Sequence[str]) -> Target | None:
        """The target where ``others``, full names of parameters, are its own parameter too; None if it follows another.

        Raises:
            SchemeError: it can't be quantized then.
        """
        names = [name.rpartition(".")[0] for name in others]
        if any(isinstance(root.get_submodule(name), nn.Embedding) for name in names):
            raise SchemeError(
                "its weight is tied to the embeddings. Add it to ignore, or quantize the one table of both: a rule "
                "with targets: [Embedding]."
            )
        raise SchemeError(
            f"its weight is that of {_some(names)} too, and what is shared can't be quantized. Leave all that they "
            f"share in float: ignore '{_pattern([target.module, *names])}'."
        )

    # ---- its weights, and which way round they are
    def parameters(self, leaf: str) -> tuple[str, ...]:
        """Names, in the module, of the parameters that a target's matrices are made of."""
        return ("weight",)

    @abstractmethod
    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:
        """A target's matrix [out, in]; of a fused one [matrices, out, in]. A view where it can be one."""

    @abstractmethod
    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`matrix`: what parameters, by name in the module, must hold for it to be ``matrix``."""

    # ---- what it reads
    def reads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Which of a call's arguments the matrix is multiplied with."""
        return first_tensor(args, kwargs)

    def cut(self, module: nn.Module) -> str:
        """How the input is cut into rows: two modules that read one tensor share statistics where this is equal."""
        return ""

    def enters(self, module: nn.Module, x: Tensor) -> Tensor:
        """What a quantizer of inputs gets of what :meth:`reads` gave: as it is, or rotated."""
        return x

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the matrix is multiplied with: [..., in], of a grouped convolution [groups, rows, in].

        Args:
            module: in float.
            x: what :meth:`reads` gave, without the rows of padding.
        """
        return x

    def routed(
        self, module: nn.Module, leaf: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        """Of a fused target: what each matrix that is used in this call reads, [rows, in], with its number."""
        return iter(())

    def products(self, module: nn.Module, output: Tensor) -> int:
        """How many rows the matrix was multiplied with to give ``output``, of one sample; may be on the meta device."""
        return output[..., 0].numel()

    def watch_operands(self, module: nn.Module, see: Callable[[str, Tensor], None]) -> Callable[[], None]:
        """Show each of :attr:`operands`, by name, to ``see`` whenever the module runs; returns what ends it."""
        raise ModelError(f"{type(module).__name__} has no operands to watch.")

    def pairs(self, operands: Mapping[str, Tensor]) -> list[Operands]:
        """The products, two operands each: ``left @ right^T``, float32 [products, n, in] and [products, m, in]."""
        return []

    # ---- what it becomes
    @abstractmethod
    def put(self, root: nn.Module, target: Target, made: Quantized) -> None:
        """Put the quantized module where the float one of ``root`` stands."""

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 (most need nothing)
        """Let a model call quantized modules of this kind, where that takes more than their being there."""

    # ---- what trains in its place
    def sites(self, target: Target, module: nn.Module) -> Iterator[Site]:
        """The tensors that a planned target's rule rounds.

        Raises:
            SchemeError: nothing of the kind can be trained.
        """
        raise SchemeError(
            f"its kind is '{self}', whose quantization can't be trained yet. Ignore it "
            f"({', '.join(self.class_names(module))}), or narrow the rule's targets."
        )

    def watch_sites(self, module: nn.Module, see: Callable[[str, Tensor], None]) -> Callable[[], None]:
        """Show the activations among its sites, by name, to ``see`` whenever the module runs; returns what ends it.

        The model may have been told to call it (:meth:`prepare`).
        """
        raise ModelError(f"{type(module).__name__} has no activations to watch.")

    def put_twin(self, root: nn.Module, target: Target, learned: Mapping[str, Learned]) -> list[Twin]:
        """Put what trains where the float module of ``root`` stands; returns what is new.

        Args:
            root: the model.
            target: planned.
            learned: of each of its sites, by name.
        """
        raise SchemeError(f"a {type(root.get_submodule(target.module)).__name__} has nothing that trains in its place.")

    def prepare_twins(self, model: nn.Module, targets: Sequence[Target]) -> None:
        """Let a model call the twins of these targets, all of this kind."""
        self.prepare(model)

    # ---- how a file describes it
    @abstractmethod
    def describe(self, module: nn.Module, layouts: Layouts) -> dict[str, Any]:
        """How to rebuild a quantized module empty: the entry of a checkpoint's ``modules``.

        ``class`` is :attr:`entry`. Numbers of layouts are under ``weight`` (one) or ``weights`` (a list), and nowhere
        else: they change when parts of a checkpoint are joined. The name of another module is under ``table``: it
        changes when a model with another head, or none, is loaded.
        """

    def holder(self, name: str) -> str:
        """Path of the module that a model must have for what a file describes as ``name``."""
        return name

    @abstractmethod
    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:
        """Put the empty quantized module that ``entry`` describes where the float one called ``name`` stands.

        ``entry`` is from a file that may say anything: KeyError, TypeError and the like are reported as malformed.

        Raises:
            FileError: the entry contradicts the model. ModelError: the model has no such module.
        """

    @abstractmethod
    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:
        """Add what the module called ``name`` keeps in a file.

        Args:
            name: of the quantized module.
            entry: its description.
            weights: empty QTensors by number of layout.
            into: gets the tensors.
        """


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call; the first tensor among the named ones, where there are only those."""
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found


def live(module: nn.Module) -> Get:
    """The parameters that a module has now."""
    return lambda name: getattr(module, name)


def module_at(root: nn.Module, path: str, name: str) -> nn.Module:
    """The module that a file's description of ``name`` is for.

    Raises:
        ModelError: there is none.
    """
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"the checkpoint quantizes {name}, which this model does not have.") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _pattern(names: Sequence[str]) -> str:
    """A pattern for modules that share weights, and for what else is in the same part of each of their blocks."""
    parts = [name.split(".") for name in names]
    same = next((n for n in range(min(map(len, parts))) if len({part[-1 - n] for part in parts}) > 1), 0)
    if not same:
        return f"re:({'|'.join(map(re.escape, names))})"
    owners = "|".join(re.escape(".".join(part[:-same])) for part in parts)
    return rf"re:({owners})\.{re.escape(parts[0][-same])}(\..*)?"
