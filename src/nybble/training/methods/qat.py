"""Quantization-aware training: the layers that a scheme names become trainable twins, and all of the network trains.

Forward is what the packed model computes, backward what each part says (:mod:`nybble.learned`). Several stages go to
fewer and fewer bits, each from the float weights of the one before (multi-step: Liu et al. 2022, arXiv:2205.13016,
section 3.3; progressive precision). What it is told are losses of :mod:`nybble.training.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from nybble.core.errors import SchemeError, UsageError, within
from nybble.core.options import named
from nybble.learned import Part, make_part
from nybble.learned._first_of import FirstOf
from nybble.nn.kinds.tied import untie_head
from nybble.scheme import Scheme, parse_scheme
from nybble.training.activation import check_activation, use_activation
from nybble.training.callbacks import Acting, Callback
from nybble.training.callbacks import make_part as make_callback
from nybble.training.composing import compose_query_keys
from nybble.training.convert import convert
from nybble.training.coreset import CoresetOptions
from nybble.training.methods import Given, Place, StagedMethod
from nybble.training.norms import check_norms
from nybble.training.objective import make_losses, needs_teacher
from nybble.training.prepare import ROLES, check_rounded, learning_groups, prepare, rounded_roles
from nybble.training.unprepare import float_values, inherit, learned_values

ALL, LEARNED = "all", "learned"


@dataclass(frozen=True, kw_only=True)
class QatOptions:
    """Of the training.

    ``learned``: by role (weights, inputs, outputs ...) the part that learns, a name or ``{name: {option: value}}``, or
    a list, of which the first that can learn a quantizer does; left out: straight through. ``losses``: by name a
    weight, or a mapping of ``weight`` and the loss's options. ``rates``: learning rates over that of the loop, by what
    learns (``scales``, ``inputs.scales``). ``what``: ``all`` trains, or what is ``learned`` alone, beside frozen
    weights. ``stages``: mappings with the ``scheme`` (and perhaps ``learned``) of each training before the recipe's
    own. ``teacher``: the ``float`` network, or that of the ``stage`` before. ``inherit``: what learned in one stage
    goes on in the next, where it has the same shape. ``activation``: of the trained network in place of its own, a name
    that transformers has (``relu``). ``float_head``: an output head that shares the embeddings' table gets a float one
    of its own. ``query_key``: one weight for queries and keys of a vision transformer. ``callbacks``: what looks at
    weights at every update, by name a mapping of its options. ``coreset``: a part of the examples that is trained on,
    chosen again every few epochs (:class:`nybble.training.coreset.CoresetOptions`); left out: all. ``norm_batches``:
    batches of examples through which a network's BatchNorms are measured anew behind the last update; 0 leaves them.
    """

    learned: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] = field(default_factory=lambda: {"task": 1.0})
    rates: Mapping[str, float] = field(default_factory=dict)
    what: Literal["all", "learned"] = "all"
    stages: tuple[Mapping[str, Any], ...] = ()
    teacher: Literal["float", "stage"] = "float"
    inherit: bool = True
    activation: str = ""
    float_head: bool = False
    query_key: bool = False
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    coreset: CoresetOptions | None = None
    norm_batches: int = 0


class Qat(StagedMethod):
    """See the module."""

    summary: ClassVar[str] = "quantization-aware training of all weights, or of what is learned alone"
    options_type: ClassVar[type[Any]] = QatOptions

    def check(self, options: QatOptions, scheme: Scheme) -> None:  # noqa: D102
        make_losses(options.losses)
        for stage in range(self.stages(options)):
            _scheme(options, scheme, stage)
            _parts(options, stage)
        if options.teacher == "stage" and not options.stages:
            raise UsageError("teacher: stage is the network of the stage before, and there is one stage; say float.")
        if options.teacher == "stage" and not needs_teacher(make_losses(options.losses)):
            raise UsageError(
                "teacher: stage has nothing to teach: no loss compares with it; name logits, or say float."
            )
        if options.coreset is not None:
            options.coreset.check()
        if options.activation:
            check_activation(options.activation)
        if options.norm_batches < 0:
            raise UsageError(f"norm_batches is {options.norm_batches}; it is a number of batches, and 0 is none.")
        _callbacks(options)
        for name, rate in options.rates.items():
            if not rate >= 0:
                raise UsageError(f"rates: {name} is {rate}; a rate is a number of 0 or more, over that of the loop.")

    def check_asked(self, asked: Mapping[str, Any], options: QatOptions, scheme: Scheme) -> None:  # noqa: D102
        check_rounded(
            asked.get("learned", {}), [_scheme(options, scheme, stage) for stage in range(self.stages(options))]
        )

    def stages(self, options: QatOptions) -> int:  # noqa: D102
        return len(options.stages) + 1

    def attach(self, model: nn.Module, given: Given) -> nn.Module:  # noqa: D102
        options: QatOptions = given.options
        if options.norm_batches:
            check_norms(model)
        _change(model, given)
        model.requires_grad_(True)
        scheme = _scheme(options, given.scheme, given.stage)
        rounded = rounded_roles(scheme)  # a recipe's scheme may have been replaced by one that rounds less
        learned = {role: part for role, part in _parts(options, given.stage).items() if role in rounded}
        made = prepare(model, scheme, learned, run=given.run)
        if given.before is not None and options.inherit:
            inherit(made, given.before)
        if options.what == LEARNED:
            trained = {id(p) for p in learned_values(made).values()}
            if not trained:
                raise SchemeError("what: learned trains what parts learn, and these learn nothing; say all.")
            for p in made.parameters():
                p.requires_grad_(id(p) in trained)
        self.callbacks(made, options)  # what they remember is there before a checkpoint is read
        return made

    def callbacks(self, model: nn.Module, options: QatOptions) -> dict[str, Acting]:  # noqa: D102
        return {name: callback.attach(model) for name, callback in _callbacks(options).items()}

    def float_values(self, model: nn.Module) -> dict[str, Tensor]:  # noqa: D102
        return float_values(model)

    def losses(self, options: QatOptions) -> Mapping[str, Any]:  # noqa: D102
        return options.losses

    def coreset(self, options: QatOptions) -> CoresetOptions | None:  # noqa: D102
        return options.coreset

    def norm_batches(self, options: QatOptions) -> int:  # noqa: D102
        return options.norm_batches

    def taught_by_stage(self, options: QatOptions) -> bool:  # noqa: D102
        return options.teacher == "stage"

    def groups(self, model: nn.Module, options: QatOptions, lr: float) -> list[dict[str, Any]] | None:  # noqa: D102
        return learning_groups(model, {name: rate * lr for name, rate in options.rates.items()})

    def parts(self, model: nn.Module) -> dict[str, int]:  # noqa: D102
        learned = {id(p) for p in learned_values(model).values()}
        found = {"weights": 0, "learned": 0}
        for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            found["learned" if id(t) in learned else "weights"] += t.numel() * t.element_size()
        return found

    def finished(self, model: nn.Module, place: Place) -> nn.Module:  # noqa: D102
        return convert(model.to(place.dtype))


def _callbacks(options: QatOptions) -> dict[str, Callback]:
    return {name: make_callback(name, given) for name, given in options.callbacks.items()}


def _change(model: nn.Module, given: Given) -> None:
    """What the options say of the network itself."""
    options: QatOptions = given.options
    if options.activation:
        use_activation(model, options.activation)
    if options.float_head:
        untie_head(model)
    if options.query_key:
        compose_query_keys(model)
    if given.before is not None and (options.float_head or options.query_key):  # which has these already
        model.load_state_dict(float_values(given.before), strict=False)


def _scheme(options: QatOptions, scheme: Scheme, stage: int) -> Scheme:
    """Of a stage; the last one's is the recipe's, or what the command line made of it."""
    if stage == len(options.stages):
        return scheme
    with within(f"stages[{stage}]"):
        given = options.stages[stage]
        for key in given:
            if key not in ("scheme", "learned"):
                raise SchemeError(f"a stage has scheme and learned; got {key!r}.")
        if "scheme" not in given:
            raise SchemeError("a stage lacks its scheme.")
        if not isinstance(given.get("learned", {}), Mapping):
            raise SchemeError(f"learned is a mapping of roles ({', '.join(ROLES)}); got {given['learned']!r}.")
        return parse_scheme(given["scheme"])


def _parts(options: QatOptions, stage: int) -> dict[str, str | Part]:
    """What learns, by role."""
    given = options.learned
    if stage < len(options.stages):
        given = {**given, **options.stages[stage].get("learned", {})}
    found: dict[str, str | Part] = {}
    for role, asked in given.items():
        if role not in ROLES:
            raise SchemeError(f"learned: parts learn {', '.join(ROLES)}; got {role!r}.")
        several = asked if isinstance(asked, list | tuple) else [asked]
        pairs = [named(part, "learned part", f"learned: {role}") for part in several]
        parts = [make_part(name, more) for name, more in pairs]
        found[role] = parts[0] if len(parts) == 1 else FirstOf(parts)
    return found


PART = Qat()
