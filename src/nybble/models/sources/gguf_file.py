"""A GGUF file as an ordinary float model: config from the metadata, tensors dequantized when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from nybble.core.errors import FileError, ModelError, NybbleError
from nybble.models.build.config_file import make_config
from nybble.models.build.skeleton import expected_tensors, meta_model
from nybble.models.gguf.qtensors import with_global_scale
from nybble.models.gguf.types import by_number, decode, type_name
from nybble.models.sources import ModelSource, StoredTensor
from nybble.models.sources.gguf_header import GgufTensor, read_gguf_header
from nybble.models.sources.gguf_names import arch_of, config_dict, module_name
from nybble.models.sources.gguf_rope import FACTORS, Factors
from nybble.models.sources.match import Match, match_names
from nybble.qtensor.block import BlockQTensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_PLAIN = (0, 1)
"""Numbers of the types float32 and float16."""


def halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order of q and k: neighbours (0, d/2, 1, d/2 + 1, ...) back to halves, in each head.

    Args:
        tensor: ``[heads * d]`` or ``[heads * d, in]``.
        heads: of q, or of k and v.
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def quantized(data: np.ndarray[Any, np.dtype[np.uint8]], entry: GgufTensor, place: str) -> BlockQTensor | None:
    """A tensor's bytes as a QTensor of the same codes; None for one in float.

    Args:
        data: uint8, the tensor's bytes.
        entry: what they are.
        place: for messages.
    """
    kind = by_number().get(entry.kind)
    if kind is None:
        return None
    try:
        return decode(kind, data, entry.shape)
    except FileError as error:
        raise FileError(f"{place}: {error}") from error


def float_values(data: np.ndarray[Any, np.dtype[np.uint8]], entry: GgufTensor) -> np.ndarray[Any, Any]:
    """A float tensor's bytes, or those of a type that only the gguf package knows.

    Returns:
        float32, new and writable, of the tensor's shape.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        values = dequantize(data.reshape(math.prod(entry.shape[:-1]), -1), GGMLQuantizationType(entry.kind))
    except NotImplementedError as error:
        raise ModelError(f"a tensor of type {GGMLQuantizationType(entry.kind).name} is no weight: {error}") from error
    # A float32 tensor comes back as a view of the file.
    return values.astype(np.float32, copy=not values.flags.writeable).reshape(entry.shape)


def _check_whole(metadata: Mapping[str, Any], place: str) -> None:
    """Refuse a part of a split model, and what stands beside a model in a file of its own."""
    parts, kind = metadata.get("split.count", 1), metadata.get("general.type", "model")
    if isinstance(parts, int) and parts > 1:
        number = int(metadata.get("split.no", 0)) + 1
        raise ModelError(
            f"{place} is part {number} of {parts} of a split model. Join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if kind != "model":
        raise ModelError(f"{place} is a GGUF of type {kind!r} and no model.")


@final
class GgufSource(ModelSource):
    """A GGUF file of llama.cpp. Every weight comes out as float32, exactly what llama.cpp's formats say."""

    def __init__(self, spec: str, path: Path) -> None:
        self.spec = spec
        self.path = path
        self.streamable = True
        self.aliases = False
        self.note = ""
        self._descriptions: dict[tuple[int, tuple[int, ...]], BlockQTensor | None] = {}
        self._header = read_gguf_header(path)
        _check_whole(self._header.metadata, spec)
        name, self._arch = arch_of(self._header.metadata, spec)
        factors = self._factors()
        self._shapes = {tensor: e.shape for tensor, e in self._header.tensors.items() if tensor not in factors}
        raw = config_dict(self._header.metadata, self._shapes, name, self._arch, spec, factors)
        self.config = make_config(raw, spec)

    def _factors(self) -> dict[str, Factors]:
        """What divides the frequencies of a rope; llama.cpp does it for llama alone, of what nybble reads."""
        if self._arch.model_type != "llama":
            return {}
        found = {name: entry for name, entry in self._header.tensors.items() if name in FACTORS}
        for name, entry in found.items():
            if entry.kind not in _PLAIN:
                raise ModelError(f"{self.spec}: {name} is not in float32 or float16.")
        return {name: float_values(self._bytes(entry), entry) for name, entry in found.items()}

    @cached_property
    def _files(self) -> dict[str, str]:
        """Model name -> GGUF name."""
        found: dict[str, str] = {}
        scales = {*self._scales.values(), *(f"{w.removesuffix('.weight')}.input_scale" for w in self._scales)}
        for tensor in self._shapes:
            if tensor in scales:  # of activations none is used, as llama.cpp uses none
                continue
            name = module_name(tensor, self._arch)
            if name is None:
                # Experts and the like change what the model computes; ignoring them would be wrong.
                raise ModelError(f"{self.spec}: tensor {tensor} has no place in a {self._arch.model_type} model.")
            found[name] = tensor
        return found

    @cached_property
    def _match(self) -> Match:
        shapes = {name: self._shapes[tensor] for name, tensor in self._files.items()}
        model = meta_model(self.config, torch.float32, shapes)
        match = match_names(expected_tensors(model), shapes, model.base_model_prefix, {})
        extra = sorted(set(shapes) - set(match.files))
        if match.missing or extra:
            lacks = f"lacks {match.missing[0]}" if match.missing else f"has {extra[0]}, which the model has not"
            raise ModelError(f"{self.spec} {lacks}.")
        return match

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        entries = {name: self._entry(name) for name in self._match.files}
        return {n: StoredTensor(shape=e.shape, dtype=torch.float32, nbytes=e.nbytes) for n, e in entries.items()}

    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the file; the dtype is float32, the bytes are those on disk."""
        return self._stored

    def _entry(self, name: str) -> GgufTensor:
        return self._header.tensors[self._files[name]]

    def ties(self) -> Mapping[str, str]:
        """The head, if the file leaves it out."""
        return self._match.ties

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Dequantize the named tensors, one at a time."""
        for name in names:
            found = self.read_quantized(name)
            if found is not None:
                yield name, found.dequantize()
                continue
            entry = self._entry(name)
            tensor = self._rows(name, torch.from_numpy(float_values(self._bytes(entry), entry)))
            yield name, tensor - self._arch.norm_offset if name.endswith("norm.weight") else tensor

    def read_quantized(self, name: str) -> BlockQTensor | None:
        """A weight with the file's own codes and scales, rows in transformers' order; None for one in float.

        A scale of scales beside an NVFP4 weight is in it.
        """
        entry = self._entry(name)
        if entry.kind not in by_number():
            return None
        data = torch.from_numpy(self._bytes(entry).reshape(math.prod(entry.shape[:-1]), -1))
        found = quantized(self._rows(name, data).numpy(), entry, f"{self.spec}: {self._files[name]}")
        beside = self._scales.get(self._files[name])
        if found is None or beside is None:
            return found
        entry = self._header.tensors[beside]
        return with_global_scale(found, torch.from_numpy(float_values(self._bytes(entry), entry)))

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a float tensor is stored; float32 of a type that only the gguf package knows."""
        found = {1: torch.float16, 30: torch.bfloat16}.get(self._entry(name).kind, torch.float32)
        return torch.float32 if name.endswith("norm.weight") else found

    def described(self, name: str) -> BlockQTensor | None:
        """What :meth:`read_quantized` would give, without its numbers: tensors on the meta device."""
        entry = self._entry(name)
        key = entry.kind, tuple(entry.shape)
        if key not in self._descriptions:
            kind = by_number().get(entry.kind)
            made = None if kind is None else kind.quantizer.quantize(torch.empty(entry.shape, device="meta"))
            self._descriptions[key] = made
        return self._descriptions[key]

    @cached_property
    def _packed_names(self) -> list[str]:
        return [name for name in self.stored() if self._entry(name).kind in by_number()]

    def packed_names(self) -> Sequence[str]:
        """All that is in blocks of a type that nybble has."""
        return self._packed_names

    def read_packed(self, name: str) -> Sequence[BlockQTensor]:
        """As :meth:`read_quantized`."""
        found = self.read_quantized(name)
        assert found is not None
        return [found]

    def described_packed(self, name: str) -> Sequence[BlockQTensor]:
        """As :meth:`described`."""
        found = self.described(name)
        assert found is not None
        return [found]

    @property
    def file_type(self) -> int | None:
        """``general.file_type`` as the file says it, unchecked; None where it says no number."""
        found = self._header.metadata.get("general.file_type")
        return found if isinstance(found, int) else None

    def entries(self) -> Mapping[str, GgufTensor]:
        """All tensors of the file by their names there, scales of scales too."""
        return self._header.tensors

    def file_name(self, name: str) -> str:
        """What the file calls a tensor of the model."""
        return self._files[name]

    def scale_name(self, name: str) -> str:
        """What the file calls the scale of all scales of a packed weight; empty where there is none."""
        return self._scales.get(self._files[name], "")

    def blocks_at(self, name: str, kind: str, turned: bool) -> tuple[Path, int, int] | None:
        """File, offset and size of a packed weight's blocks; None where they are of another type or order.

        Args:
            name: of the weight in the model.
            kind: the type, as llama.cpp spells it.
            turned: whether rows are to be in the order in which llama.cpp rotates them.
        """
        entry = self._entry(name)
        found = by_number().get(entry.kind)
        if found is None or not found.as_it_is or type_name(found) != kind or self._turned(name) is not turned:
            return None
        return self.path, entry.start, entry.nbytes

    def _turned(self, name: str) -> bool:
        return self._arch.rope_interleaved and (".q_proj." in name or ".k_proj." in name)

    def _bytes(self, entry: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = np.asarray(np.memmap(self.path, np.uint8, mode="c"))  # nobody writes; torch asks for what may be written
        return data[entry.start : entry.start + entry.nbytes]

    @cached_property
    def _scales(self) -> dict[str, str]:
        """Weight -> the tensor with its scale of scales, float32 [1]."""
        found = {}
        for tensor, entry in self._header.tensors.items():
            weight = tensor.removesuffix(".scale") + ".weight"
            if tensor.endswith(".scale") and weight in self._header.tensors:
                kind = by_number().get(self._header.tensors[weight].kind)
                if kind is None or not kind.scaled_apart or entry.shape != (1,) or entry.kind != 0:
                    raise ModelError(f"{self.spec}: {tensor} is no scale of an NVFP4 weight (float32 [1]).")
                found[weight] = tensor
        return found

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """Undo what llama.cpp's converter did to the order of rows; of values, or of the bytes that they are."""
        if self._arch.rope_interleaved and ".q_proj." in name:
            return halves_apart(tensor, self.config.num_attention_heads)
        if self._arch.rope_interleaved and ".k_proj." in name:
            return halves_apart(tensor, self.config.num_key_value_heads)
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Rebuilt from the metadata."""
        from nybble.models.sources.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self._header.metadata, self.path)

    def write_side_files(self, folder: Path) -> str:
        """The tokenizer in transformers' form; one that can't be rebuilt is left out."""
        try:
            tokenizer = self.tokenizer()
        except NybbleError as error:
            return f"the result has no tokenizer: {error}"
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # its own errors don't tell a full disk from others
            raise FileError(f"{folder}: the tokenizer's files can't be written: {error}") from error
        return ""

    def generation_config(self) -> GenerationConfig | None:
        """A GGUF has none."""
        return None  # the skeleton's own, made from the config's token ids, says all that a GGUF does

    def weight_files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.path,)
