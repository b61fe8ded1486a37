"""Scheme: which tensors of which modules get which Quantizer.

As YAML (unknown keys are errors)::

    targets: [Linear]                        # class names, exact module names, or re:PATTERN (whole name)
    weights: float4_e2m1fn group=32
    inputs: float8_e4m3fn token
    ignore: [lm_head]

or several rules, the first that matches a module wins::

    rules:
      - {targets: ["re:.*down_proj"], weights: int8 channel}
      - {targets: [Linear], weights: int4 group=64}
    kv: int4 group=32                        # the KV cache of every layer; a rule of attention modules can differ

A cache's line is that of :class:`~nybble.kv_format.KVFormat`.

Preset names follow compressed-tensors where it has the name (``W4A16``, ``W8A8``, ``NVFP4``, ``MXFP4``,
``FP8_DYNAMIC``); ours carry the format: ``W4A4_E2M1``, ``W4A8_E2M1_E4M3``: weights per output channel, inputs per
token. Those of two sets of values, ``BIT_W1A1``, ``OFQ_W2A2`` ..., are in :mod:`nybble.two_sets`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from nybble.core.errors import SchemeError, did_you_mean
from nybble.kv_format import KVFormat
from nybble.matmul_format import MatmulFormat
from nybble.quantizer import Quantizer
from nybble.two_sets import TWO_SETS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Quantizers for the modules that ``targets`` match; what has none (None) stays in float.

    Attributes:
        targets: class names (``Linear``), exact module names, or ``re:`` and a pattern for the whole module name.
        weights: for the weight. inputs: for what enters the module. outputs: for what leaves it.
        matmuls: for the four operands of an attention's two products, one line for all or some apart
            (:class:`~nybble.matmul_format.MatmulFormat`); its targets are attention modules (the class ``Attention``).
        kv: for what these attentions cache, where that differs from the scheme's ``kv``.
        optional: whether it may match nothing: a role that not every network has.
    """

    targets: tuple[str, ...] = ("Linear",)
    weights: Quantizer | None = None
    inputs: Quantizer | None = None
    outputs: Quantizer | None = None
    matmuls: MatmulFormat | None = None
    kv: KVFormat | None = None
    optional: bool = False

    @property
    def of_attention(self) -> bool:
        """Whether the rule is about attention modules, which have no weight of their own."""
        return self.matmuls is not None or self.kv is not None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Rules in order, and what is left alone.

    Attributes:
        rules: the first whose target matches a module decides. ignore: as targets; wins over all rules.
        name: a preset's name, for reports. kv: for the KV cache of every layer; left out (None), each rule's own.
        together: last parts of the names of layers that stand side by side and read one input (``q_proj``, ``k_proj``,
            ``v_proj``): what a quantizer shares over a whole tensor (NVFP4's outer scale), these share among them.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ("lm_head",)
    name: str = ""
    kv: KVFormat | None = None
    together: tuple[tuple[str, ...], ...] = ()

    def match(self, modules: Mapping[str, Sequence[str]], fixed: Collection[str] = ()) -> Matches:
        """Assign rules to modules.

        Args:
            modules: name -> the class names it answers to (its own, and ``Linear`` for whatever holds a matrix).
            fixed: names of those that nothing quantized can stand for, whatever the rules say.

        Raises:
            SchemeError: a target or an ignore pattern that matches nothing, unless it is the default ignore.
        """
        chosen: dict[str, Rule] = {}
        targets = dict.fromkeys((target for rule in self.rules for target in rule.targets), 0)
        ignores = dict.fromkeys(self.ignore, 0)
        ignored: list[str] = []
        kept: list[str] = []
        for name, classes in modules.items():
            out = next((p for p in self.ignore if matches(p, name, classes)), None)
            if out is not None:
                ignores[out] += 1
                ignored.append(name)
                continue
            pairs = ((rule, t) for rule in self.rules for t in rule.targets if matches(t, name, classes))
            rule, target = next(pairs, (None, ""))
            if rule is not None and name in fixed:
                kept.append(name)
            elif rule is not None:
                targets[target] += 1
                chosen[name] = rule
        known = (*modules, *{c for classes in modules.values() for c in classes})
        spare = {target for rule in self.rules if rule.optional for target in rule.targets}
        for target, count in targets.items():
            if count == 0 and target not in spare:
                taken = any(matches(target, name, classes) for name, classes in modules.items())
                hint = (
                    " What it matches is ignored, can't be quantized, or an earlier target takes it."
                    if taken
                    else did_you_mean(target, known)
                )
                raise SchemeError(f"the target {target!r} matches no module that is left to it.{hint}")
        for pattern, count in ignores.items():
            if count == 0 and pattern != "lm_head":
                raise SchemeError(f"the ignore pattern {pattern!r} matches no module.{did_you_mean(pattern, known)}")
        return Matches(chosen, targets | ignores, tuple(ignored), tuple(kept))

    def to_dict(self) -> dict[str, Any]:
        """As YAML or JSON would hold it; ``parse_scheme`` reads it back."""
        rules = []
        for rule in self.rules:
            lines = {
                f.name: str(getattr(rule, f.name))
                for f in fields(rule)
                if f.name not in ("targets", "optional") and getattr(rule, f.name)
            }
            optional = {"optional": True} if rule.optional else {}
            rules.append({"targets": list(rule.targets), **optional, **lines})
        found: dict[str, Any] = {"rules": rules, "ignore": list(self.ignore)}
        if self.name:
            found["name"] = self.name
        if self.together:
            found["together"] = [list(group) for group in self.together]
        return found if self.kv is None else {**found, "kv": str(self.kv)}

    def of_model(self, dtype: torch.dtype) -> Scheme:
        """With all that its lines leave to a model in ``dtype`` said (:meth:`nybble.quantizer.Quantizer.of_model`)."""
        rules = (replace(rule, weights=rule.weights and rule.weights.of_model(dtype)) for rule in self.rules)
        return replace(self, rules=tuple(rules))

    def override(self, *, weights: Quantizer | None = None, inputs: Quantizer | None = None) -> Scheme:
        """The same targets with other quantizers (``--weights``, ``--activations``)."""
        changed = tuple(
            rule if rule.of_attention else replace(rule, weights=weights or rule.weights, inputs=inputs or rule.inputs)
            for rule in self.rules
        )
        return replace(self, rules=changed, name="")


@dataclass(frozen=True)
class Matches:
    """What a scheme did with a model's modules.

    Attributes:
        rules: module name -> its rule, in the model's order. counts: pattern -> modules it decided.
        ignored: names left out. fixed: names that a rule asks for and that can't be quantized.
    """

    rules: dict[str, Rule]
    counts: dict[str, int]
    ignored: tuple[str, ...]
    fixed: tuple[str, ...] = ()


def matches(pattern: str, name: str, classes: Sequence[str]) -> bool:
    """Whether a target names this module: a class name, an exact name, or ``re:`` and a pattern for the whole name."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise SchemeError(f"the pattern {pattern!r} is not a regular expression: {error}.") from error
    return pattern == name or pattern in classes


def in_short(targets: Mapping[str, int]) -> dict[str, int]:
    """Targets and what each of them counts; names that differ in a number alone are one, with ``*`` for the number.

    >>> in_short({"layers.0.up": 1, "layers.1.up": 1, "Linear": 4})
    {'layers.*.up': 2, 'Linear': 4}
    """
    found: dict[str, int] = {}
    for target, count in targets.items():
        short = target if target.startswith("re:") else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", target)
        found[short] = found.get(short, 0) + count
    return found


def split_apart(found: Matches, alike: Mapping[str, tuple[str, ...]]) -> tuple[Matches, dict[str, str]]:
    """The matches without the modules that only look like those of a kind, and these with their classes.

    Args:
        found: what a scheme did with all.
        alike: name -> the class names it answers to, its own first.

    Raises:
        SchemeError: a target takes nothing else.
    """
    apart = {name: classes[0] for name, classes in alike.items() if name in found.rules}
    counts = dict(found.counts)
    for name, cls in apart.items():
        target = next(t for t in found.rules[name].targets if matches(t, name, alike[name]))
        counts[target] -= 1
        if not counts[target]:
            raise SchemeError(
                f"the target {target!r} takes {name} and nothing that can be quantized: a {cls} computes "
                "something else with its weight than the layer that would stand for it. Leave the target out."
            )
    rules = {n: r for n, r in found.rules.items() if n not in apart}
    return Matches(rules, counts, found.ignored, found.fixed), apart


_CT_INT4, _CT_INT8, _CT_TOKEN = "int4-ct", "int8-ct", "int8_full token scale=absmax(target=127.5)"

#: name -> (weights, inputs), as quantizer lines
PRESETS: dict[str, tuple[str, str | None]] = {
    "W4A16": (_CT_INT4, None),
    "W4A16_ASYM": ("int4 group=128 symmetric=false", None),
    "W8A16": (_CT_INT8, None),
    "W8A8": (_CT_INT8, _CT_TOKEN),
    "W4A8": (_CT_INT4, _CT_TOKEN),
    "W4A4": (_CT_INT4, "int4_full token scale=absmax(target=7.5)"),
    "FP8": ("float8_e4m3fn tensor", "float8_e4m3fn tensor static"),
    "FP8_DYNAMIC": ("float8_e4m3fn channel", "float8_e4m3fn token"),
    "W4AFP8": (_CT_INT4, "float8_e4m3fn token"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "NVFP4A16": ("nvfp4", None),
    "MXFP4": ("mxfp4", "mxfp4-ct"),  # inputs as vLLM rounds them: a search at every token gains nothing
    "MXFP4A16": ("mxfp4", None),
    "MXFP6": ("mxfp6", "mxfp6"),
    "MXFP8": ("mxfp8", "mxfp8"),
    "MXINT8": ("mxint8", "mxint8"),
}


_LINES: dict[str, Callable[[str], Any]] = {"kv": KVFormat.parse, "matmuls": MatmulFormat.parse}
_RULE_KEYS = ("targets", "weights", "inputs", "outputs", "matmuls", "kv")


def preset_scheme(name: str) -> Scheme:
    """A scheme by name: a preset, or ``W4A8_E2M1_E4M3``: bits, then the formats of weights and inputs.

    Raises:
        SchemeError: unknown name, or bits that contradict the formats.
    """
    if name in PRESETS:
        weights, inputs = (None if line is None else Quantizer(line) for line in PRESETS[name])
        return Scheme(rules=(Rule(weights=weights, inputs=inputs),), name=name)
    if name in TWO_SETS:
        return parse_scheme({**TWO_SETS[name].to_dict(), "name": name})
    spelled = re.fullmatch(r"W(\d+)A(\d+)_(E\d+M\d+|INT)(?:_(E\d+M\d+|INT))?", name)
    if spelled is None:
        raise SchemeError(
            f"unknown scheme {name!r}.{did_you_mean(name, [*PRESETS, *TWO_SETS, 'W4A4_E2M1', 'W4A8_E2M1_E4M3'])}"
        )
    w_bits, a_bits, w_format, a_format = int(spelled[1]), int(spelled[2]), spelled[3], spelled[4] or spelled[3]
    weights = _spelled(name, w_bits, w_format, "channel")
    inputs = None if a_bits == 16 else _spelled(name, a_bits, a_format, "token")
    return Scheme(rules=(Rule(weights=weights, inputs=inputs),), name=name)


def _spelled(name: str, bits: int, fmt: str, granularity: str) -> Quantizer:
    quantizer = Quantizer(f"int{bits}" if fmt == "INT" else fmt.lower(), **{granularity: True})
    if quantizer.format.bits != bits:
        raise SchemeError(f"scheme {name!r}: {fmt} has {quantizer.format.bits} bits, the name says {bits}.")
    return quantizer


def parse_scheme(data: str | Mapping[str, Any]) -> Scheme:
    """A scheme from a preset's name or from YAML's mapping (module docstring).

    Raises:
        SchemeError: unknown keys, no rules, unknown names.
    """
    if isinstance(data, str):
        return preset_scheme(data)
    if not isinstance(data, Mapping):
        raise SchemeError(f"a scheme is a preset's name or a mapping; got {data!r}.")
    if "preset" in data:
        base = preset_scheme(str(data["preset"]))
        _known(data, ("preset", "ignore", "kv"), "a scheme with a preset")
        return replace(base, ignore=_strings(data.get("ignore", base.ignore), "ignore"), kv=_kv(data))
    if "rules" in data:
        _known(data, ("rules", "ignore", "name", "kv", "together"), "a scheme with rules")
        if not isinstance(data["rules"], Sequence) or not all(isinstance(rule, Mapping) for rule in data["rules"]):
            raise SchemeError(f"rules is a list of mappings; got {data['rules']!r}.")
        rules = tuple(_rule(rule) for rule in data["rules"])
    else:
        _known(data, (*_RULE_KEYS, "ignore", "name", "together"), "a scheme")
        rule = {k: v for k, v in data.items() if k not in ("ignore", "name", "kv", "together")}
        rules = (_rule(rule),) if rule or "kv" not in data else ()
    kv = _kv(data)
    if not rules and kv is None:
        raise SchemeError("a scheme without rules quantizes nothing; give targets and weights.")
    ignore = _strings(data.get("ignore", ("lm_head",)), "ignore")
    together = tuple(_strings(group, "a group of together") for group in data.get("together", ()))
    return Scheme(rules=rules, ignore=ignore, name=str(data.get("name", "")), kv=kv, together=together)


def _rule(data: Mapping[str, Any]) -> Rule:
    _known(data, (*_RULE_KEYS, "optional"), "a rule")
    if not isinstance(data.get("optional", False), bool):
        raise SchemeError(f"optional is true or false; got {data['optional']!r}.")
    lines: dict[str, Any] = {}
    for key in _RULE_KEYS[1:]:
        line = data.get(key)
        if line is not None and not isinstance(line, str):
            raise SchemeError(f"{key} is a quantizer line such as 'int4 group=32'; got {line!r}.")
        if line:
            lines[key] = _LINES.get(key, Quantizer)(line)
    if not lines:
        raise SchemeError("a rule without weights, inputs, outputs, matmuls or kv does nothing.")
    attention = [key for key in ("matmuls", "kv") if key in lines]
    if attention and len(lines) > len(attention):
        raise SchemeError(
            f"{' and '.join(attention)}: for attention modules; give them a rule of their own (targets: [Attention])."
        )
    if "outputs" in lines and lines["outputs"].static:
        raise SchemeError("outputs are quantized dynamically; leave out 'static'.")
    default = ("Attention",) if attention else ("Linear",)
    return Rule(
        targets=_strings(data.get("targets", default), "targets"), optional=data.get("optional", False), **lines
    )


def _kv(data: Mapping[str, Any]) -> KVFormat | None:
    line = data.get("kv")
    if line is not None and not isinstance(line, str):
        raise SchemeError(f"kv is a quantizer line such as 'int4 group=32'; got {line!r}.")
    return KVFormat.parse(line) if line else None


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise SchemeError(f"{what} is a list of names; got {value!r}.")
    return tuple(value)


def _known(data: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    for key in data:
        if key not in keys:
            raise SchemeError(f"{what} has no key {key!r}.{did_you_mean(str(key), keys)}")


def shares_over_rows(quantizer: Quantizer) -> bool:
    """Whether a weight has a scale that belongs to the whole of it, or its scales have.

    >>> [shares_over_rows(Quantizer(q)) for q in ("nvfp4", "float8_e4m3fn tensor", "mxfp4", "int4 group=32")]
    [True, True, False, False]
    """
    inner = quantizer.scale_format
    if isinstance(inner, Quantizer) and inner.granularity.one_scale and str(inner.scale) != "one":
        return True
    return quantizer.granularity.one_scale and str(quantizer.scale) != "one"
