"""One GGUF file, which llama.cpp and what is built on it run.

Weights of a block type's own line (``q4_k``, ``q8_0``, ``mxfp4``, ``nvfp4`` ...), or of a line that a type holds
exactly, keep every code. What is in float stays so, or gets the type that stands behind the colon (``gguf:q4_k_m``),
as embeddings and heads do there. Source: github.com/ggml-org/ggml, ``docs/gguf.md``; see
:mod:`nybble.models.gguf.write`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from nybble.core.errors import FileError, GranularityError, SchemeError
from nybble.core.guard import reading
from nybble.export import Cast, ExportTarget, Facts, Refusal, Takes, Usual, Verified
from nybble.export._folder import write_beside
from nybble.export._last_bit import moves, outer_of
from nybble.export._source import Layer, Source
from nybble.models.build.config_file import make_config
from nybble.models.gguf.metadata import arch_for, config_pairs, gguf_name, lost_window
from nybble.models.gguf.mixes import FLOATS, file_type_name, file_types, fitting, mix, type_for
from nybble.models.gguf.qtensors import exact_type, global_scale, line_of
from nybble.models.gguf.rope import lengths_differ
from nybble.models.gguf.types import WritableType, block_type, type_name, writable_types
from nybble.models.gguf.vocabulary import tokenizer_pairs
from nybble.models.gguf.write import Weight, file_type_of, ggml_type, permuted, plan, write_gguf
from nybble.models.sources.folder import read_tokenizer
from nybble.models.sources.stored import DTYPES
from nybble.qtensor import Inverse, QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scheme import Matches, Rule, Scheme, matches

if TYPE_CHECKING:
    from torch import Tensor

NEAREST = "a line of GGUF's own (q8_0, q4_k, mxfp4 ...), or gguf:TYPE, which rounds again"
_SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h"
_PULL = "https://github.com/ggml-org/llama.cpp/pull/"
_PULLS = {
    "Q5_0": 1187, "Q5_1": 1187, "Q2_K": 1684, "Q3_K": 1684, "Q4_K": 1684, "Q5_K": 1684, "Q6_K": 1684, "IQ4_NL": 5590,
    "IQ4_XS": 5747, "TQ1_0": 8151, "TQ2_0": 8151, "MXFP4": 15091, "NVFP4": 19769, "Q1_0": 21273, "Q2_0": 24448,
}  # fmt: skip
"""What brought each type to llama.cpp, which numbers no versions; all merged. k-quants by what #5196 says of #1684."""
TOKENIZER = "tokenizer.json"
_BARE = (
    "`{file}` holds no tokenizer, so llama.cpp doesn't load it: put tokenizer.json beside the model, and export it "
    "again."
)
_CARD = "`{file}` runs in llama.cpp (`llama-cli -m {file}`) and in what is built on it; nybble is not needed."


def _row(line: str, form: str) -> Takes:
    pull = _PULLS.get(form)
    since, source = ("", _SOURCE) if pull is None else (f"pull request {pull}", f"{_PULL}{pull}")
    return Takes(weights=line, inputs="float", form=form, runtime="llama.cpp", since=since, source=source)


class Gguf(ExportTarget):
    """A file for llama.cpp."""

    summary = "a GGUF file for llama.cpp"
    in_float = True
    options: ClassVar[dict[str, str]] = {name.lower(): f"what is in float becomes {name}" for name in file_types()}
    loses = (
        "the rounding of inputs and of the KV cache; sliding windows, but of Gemma; behind "
        "a colon, all is rounded again that has another type"
    )
    usual = Usual(option="q4_k_m")
    at_once = True
    takes = tuple(_row(kind.line, type_name(kind)) for kind in writable_types().values())

    def constrain(self, scheme: Scheme, facts: Facts) -> Scheme:
        """With a type behind the colon its own lines; else each line has to be one that a type holds.

        Raises:
            SchemeError: inputs that would be rounded, or a line that no type holds. ModelError: an architecture, a
                tensor or a tokenizer that llama.cpp doesn't know. UsageError: the package gguf is too old for a type.
        """
        _check_model(facts)
        found = scheme.match(facts.classes)
        rules: dict[Rule, list[str]] = {}
        for name, rule in (found.rules | self._rest(found, scheme, facts)).items():
            if rule.inputs is not None or rule.outputs is not None:
                raise SchemeError(f"{name}: a GGUF keeps no quantizer of inputs or outputs; pass --activations none.")
            if rule.weights is not None:
                rules.setdefault(self._rule(rule, name, facts), []).append(name)
        made = [replace(rule, targets=tuple(names)) for rule, names in rules.items()]
        named = {name for names in rules.values() for name in names}
        return replace(
            scheme,
            rules=(*made, *(rule for rule in scheme.rules if rule.of_attention)),
            ignore=tuple(pattern for pattern in scheme.ignore if pattern not in named),
        )

    def _rest(self, found: Matches, scheme: Scheme, facts: Facts) -> dict[str, Rule]:
        """The head and the embedding, which a type behind the colon rounds too: they are calibrated as they will be."""
        if not self.option or mix(self.option).base in FLOATS or not any(r.weights for r in found.rules.values()):
            return {}
        asked = {pattern for pattern in scheme.ignore if pattern != "lm_head"}
        config = make_config(dict(facts.config), "the model")
        arch = arch_for(config)[1]
        places = ("token_embd.weight",) if config.tie_word_embeddings else ("token_embd.weight", "output.weight")
        return {
            name: Rule(weights=Quantizer(block_type(mix(self.option).base).line))
            for name in facts.targets
            if gguf_name(f"{name}.weight", arch) in places
            and name not in found.rules
            and not any(matches(pattern, name, facts.classes[name]) for pattern in asked)
        }

    def _rule(self, rule: Rule, name: str, facts: Facts) -> Rule:
        assert rule.weights is not None
        target = facts.targets[name]
        if not self.option:
            held_in = _type_of(rule.weights, name, target.shape)
            ggml_type(type_name(held_in))
            return replace(rule, targets=(), weights=_halves(rule.weights, held_in))
        config = make_config(dict(facts.config), "the model")
        at = gguf_name(f"{name}.weight", arch_for(config)[1])
        if at is None:
            raise SchemeError(f"{name} has no place in a GGUF; ignore it, or use another target.")
        wanted = type_for(mix(self.option), at, config.num_hidden_layers, bool(config.tie_word_embeddings))
        kind = fitting(wanted, target.shape[1])
        ggml_type(kind)
        return replace(rule, targets=(), weights=None if kind in FLOATS else Quantizer(block_type(kind).line))

    def check(self, source: Source) -> list[Refusal]:  # noqa: D102
        config = source.transformers_config
        config_pairs(config, *arch_for(config))
        if self.option:
            return []
        found: dict[str, list[str]] = {}
        wide: list[str] = []
        for layer in source.layers.values():
            for prefix, weight in layer.weights.items():
                if exact_type(weight) is None:
                    found.setdefault(line_of(weight), []).append(layer.name)
                elif _too_fine(source, prefix, weight):
                    wide.append(layer.name)
        refusals = [Refusal(layers=tuple(names), came=line, nearest=NEAREST) for line, names in found.items()]
        if wide:
            came, nearest = "scales in float32 that float16 does not have", "scale_format=float16"
            refusals.append(Refusal(layers=tuple(wide), came=came, nearest=nearest))
        return refusals

    def notes(self, source: Source) -> list[str]:  # noqa: D102
        lines = plan(source.transformers_config, _weights(source), self.option)[1]
        rounded = [layer.name for layer in source.layers.values() if layer.inputs or layer.outputs]
        if rounded:
            lines.append(f"activations are rounded as llama.cpp does, not as here: {rounded[0]}")
        name, arch = arch_for(source.transformers_config)
        if (window := lost_window(source.transformers_config, arch)) is not None:
            lines.append(
                f"llama.cpp's {name} attends to every token, this model to the last {window}: longer texts differ"
            )
        if line := lengths_differ(source.transformers_config):
            lines.append(line)
        if source.kv is not None:
            lines.append("the KV cache is llama.cpp's own (--cache-type-k, --cache-type-v)")
        if TOKENIZER not in source.side_files():
            lines.append(
                f"without a tokenizer, as {source.place} has no {TOKENIZER}: llama.cpp doesn't load such a file"
            )
        return lines

    def rounds(self, source: Source) -> dict[str, Quantizer]:  # noqa: D102
        if not self.option:
            return {}
        at = {f"{layer.name}.weight": name for name, layer in source.layers.items() if layer.weights}
        planned = plan(source.transformers_config, _weights(source), self.option)[0]
        again = {at[t.source]: t.kind for t in planned if t.source in at and not t.exact and t.kind not in FLOATS}
        exact = {t.source: t.kind for t in planned if t.source in at and t.exact}
        for layer in source.layers.values():
            for prefix, weight in layer.weights.items():
                if _too_fine(source, prefix, weight) and f"{layer.name}.weight" in exact:
                    again[layer.name] = exact[f"{layer.name}.weight"]
        return {name: Quantizer(block_type(kind).line) for name, kind in again.items()}

    def casts(self, source: Source) -> list[Cast]:  # noqa: D102
        weights, again = _weights(source), self.rounds(source)
        found = []
        for tensor in plan(source.transformers_config, weights, self.option)[0]:
            name, stored = tensor.source.removesuffix(".weight"), weights[tensor.source].stored
            came = str(weights[tensor.source].dtype).removeprefix("torch.") if stored is None else line_of(stored)
            kept = ("F32", {"float16": "F16", "bfloat16": "BF16"}.get(came))
            if not tensor.exact and tensor.kind not in kept and name not in again:
                found.append(Cast(name=name, came=came, to=tensor.kind))
        return found

    def shifts(self, source: Source) -> list[Refusal]:  # noqa: D102
        bad = []
        for layer in source.layers.values():
            for prefix, weight in layer.weights.items():
                if isinstance(outer_of(weight), Inverse) and exact_type(weight) is not None:
                    factor = 1 / source.tensor(f"{prefix}.scale.scale.divisor").float().reshape(())
                    if moves(source, prefix, weight, factor.item()):
                        bad.append(layer.name)
        why = "under its reciprocal, a factor, a last bit of values moves"
        found = Refusal(layers=tuple(dict.fromkeys(bad)), came="NVFP4 over a divisor", nearest="nvfp4", why=why)
        return [found] if bad else []

    def write(self, source: Source, folder: Path) -> None:  # noqa: D102
        config, weights = source.transformers_config, _weights(source)
        kind = file_type_of(plan(config, weights, self.option)[0], self.option, source.file_type)
        file = f"{file_stem(source.title, file_type_name(source.file_type))}-{kind}.gguf"
        has = TOKENIZER in source.side_files()
        write_beside(source, folder, (_CARD if has else _BARE).format(file=file))
        with reading(f"the tokenizer of {source.place}"):
            tokenizer = read_tokenizer(folder, config) if has else None
        done = write_gguf(
            folder / file, config, weights, tokenizer=tokenizer, file_type=self.option, name=source.title,
            was=source.file_type,
        )  # fmt: skip
        self.errors = {name.removesuffix(".weight"): error for name, error in done.errors.items()}

    def verify(self, folder: Path, source: Source) -> Verified:
        """By the gguf package's reader and dequantizer, which know nothing of nybble."""
        from gguf import GGUFReader

        weights, config = _weights(source), source.transformers_config
        _, arch = arch_for(config)
        (file,) = folder.glob("*.gguf")
        theirs = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
        count, unread = 0, dict[str, list[str]]()
        for tensor in plan(config, weights, self.option)[0]:
            if not tensor.exact:
                continue
            found: Any = weights[tensor.source].read()
            wanted = permuted(tensor.source, found.dequantize(), config, arch)
            beside = theirs.get(f"{tensor.name.removesuffix('.weight')}.scale")
            values = _dequantized(theirs[tensor.name])
            if values is None:
                unread.setdefault(theirs[tensor.name].tensor_type.name, []).append(tensor.name)
                continue
            if not _equal(values.view(wanted.shape), wanted, None if beside is None else global_scale(found)):
                raise FileError(f"{file}: {tensor.name} differs from {tensor.source}.")
            count += 1
        lines = [
            f"this gguf decodes no {kind}, so {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} were not"
            for kind, names in unread.items()
        ]
        return Verified(
            opened_with={"gguf": version("gguf")}, weights=count, exact_in="float32", cosine=None, largest=None,
            uncalled="; ".join(["the file's tensors were compared, llama.cpp was not run", *lines]),
        )  # fmt: skip


def file_stem(title: str, kind: str = "") -> str:
    """A model's name as a part of a file's, without its type: ``org/Name 1B`` is ``Name-1B``."""
    found = re.sub(r"[^A-Za-z0-9._]+", "-", title.rsplit("/")[-1]).strip("-.")
    if kind and found.upper().endswith((f"-{kind}", f".{kind}")):
        found = found[: -len(kind) - 1]
    return found or "model"


def _dequantized(theirs: Any) -> Tensor | None:
    """A tensor's values as the gguf package decodes them; None of a type that it can't decode."""
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(np.array(dequantize(theirs.data, theirs.tensor_type)))
    except NotImplementedError:
        return None


def _equal(values: Tensor, wanted: Tensor, scale: Tensor | None) -> bool:
    """The same values; under a scale of scales, which is multiplied in another order, to a float32's last bits."""
    if scale is None:
        return torch.equal(values, wanted)
    return bool(torch.allclose(values * scale, wanted, rtol=4e-7, atol=0))


def _too_fine(source: Source, prefix: str, weight: QTensor) -> bool:
    """Whether a weight that its type could hold has scales in float32 that are no float16; only scales are read."""
    kind = exact_type(weight)
    if kind is None or not isinstance(weight, BlockQTensor) or not isinstance(kind.quantizer.scale_format, str):
        return False
    for side in ("scale", "offset"):
        value = getattr(weight.params, side)
        if isinstance(value, torch.Tensor) and value.dtype != torch.float16:
            found = source.tensor(f"{prefix}.{side}").float()
            if not torch.equal(found.to(torch.float16).float(), found):
                return True
    return False


def _check_model(facts: Facts) -> None:
    """What a file needs beside quantized weights, before there are any."""
    config = make_config(dict(facts.config), "the model")
    config_pairs(config, *arch_for(config))
    parameters = facts.model.named_parameters()
    plan(config, {name: Weight(shape=tuple(p.shape), read=p.detach) for name, p in parameters})
    if (tokenizer := facts.tokenizer()) is not None:
        tokenizer_pairs(tokenizer, config.vocab_size)


def _halves(quantizer: Quantizer, kind: WritableType) -> Quantizer:
    """With scales and offsets in float16 where its type keeps them so."""
    if not isinstance(kind.quantizer.scale_format, str):
        return quantizer
    changed = {"scale_format": "float16"} | ({"offset_format": "float16"} if quantizer.scale.has_offset else {})
    return quantizer.replace(**changed)


def _type_of(quantizer: Quantizer, name: str, shape: tuple[int, int]) -> WritableType:
    """The type that holds a line exactly."""
    try:
        made = quantizer.quantize(torch.empty(shape, device="meta"))
    except GranularityError as error:
        raise SchemeError(f"{name}: {error}") from error
    if (kind := exact_type(made)) is None:
        raise SchemeError(f"{name}: no GGUF type holds {line_of(made)} in rows of {shape[1]} exactly; use {NEAREST}.")
    return kind


def _weights(source: Source) -> dict[str, Weight]:
    """Parameter -> weight, of floats and of quantized layers."""
    found = {
        name: Weight(shape=entry.shape, dtype=DTYPES[entry.dtype], read=partial(source.tensor, name))
        for name, entry in source.floats.items()
    }
    for layer in source.layers.values():
        for prefix, described in layer.weights.items():
            found[f"{layer.name}.weight"] = Weight(
                shape=described.shape,
                read=partial(_read, source, layer, prefix),
                stored=described,
                blocks=partial(source.blocks, layer),
            )
    return found


def _read(source: Source, layer: Layer, prefix: str) -> Any:
    return source.weight(layer, prefix)


PART = Gguf
