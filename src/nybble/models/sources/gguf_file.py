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
from nybble.models.sources import ModelSource, StoredTensor
from nybble.models.sources.gguf_header import GgufTensor, read_gguf_header
from nybble.models.sources.gguf_names import arch_of, config_dict, module_name
from nybble.models.sources.match import Match, match_names

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

STEP_VALUES = 1 << 18


def halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order of q and k: neighbours (0, d/2, 1, d/2 + 1, ...) back to halves, in each head.

    Args:
        tensor: ``[heads * d]`` or ``[heads * d, in]``.
        heads: of q, or of k and v.
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def float_values(data: np.ndarray[Any, np.dtype[np.uint8]], entry: GgufTensor) -> np.ndarray[Any, Any]:
    """Dequantize a tensor's bytes.

    gguf works through a tensor 16 rows at a time. Rows are whole blocks, so several can be laid end to end, which makes
    those steps large enough to be quick and small enough for the cache.

    Returns:
        float32, new and writable, in the tensor's order.
    """
    from gguf.quants import dequantize

    rows = math.prod(entry.shape[:-1])
    joined = math.gcd(rows, 1 << max(0, (STEP_VALUES // (16 * entry.shape[-1])).bit_length() - 1))
    values = dequantize(data.reshape(rows // joined, -1), entry.kind)
    # A float32 tensor comes back as a view of the file.
    return values.astype(np.float32, copy=not values.flags.writeable)


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
        self._header = read_gguf_header(path)
        _check_whole(self._header.metadata, spec)
        name, self._arch = arch_of(self._header.metadata, spec)
        self._shapes = {tensor: entry.shape for tensor, entry in self._header.tensors.items()}
        self.config = make_config(config_dict(self._header.metadata, self._shapes, name, self._arch, spec), spec)

    @cached_property
    def _files(self) -> dict[str, str]:
        """Model name -> GGUF name."""
        found: dict[str, str] = {}
        for tensor in self._shapes:
            name = module_name(tensor, self._arch)
            if name is None:
                # rope_freqs, experts and the like change what the model computes; ignoring them would be wrong.
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
        data = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        for name in names:
            entry = self._entry(name)
            tensor = torch.from_numpy(float_values(data[entry.start : entry.start + entry.nbytes], entry))
            yield name, self._as_transformers(name, tensor.reshape(entry.shape))

    def _as_transformers(self, name: str, tensor: Tensor) -> Tensor:
        """Undo what llama.cpp's converter did to this tensor."""
        if self._arch.rope_interleaved and ".q_proj." in name:
            return halves_apart(tensor, self.config.num_attention_heads)
        if self._arch.rope_interleaved and ".k_proj." in name:
            return halves_apart(tensor, self.config.num_key_value_heads)
        return tensor - self._arch.norm_offset if name.endswith("norm.weight") else tensor

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
