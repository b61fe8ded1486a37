"""A place that a model comes from: a folder, the hub, a GGUF file, or a package that carries one.

>>> from nybble.models.sources.open import open_source
>>> source = open_source("demo:smollm2")  # doctest: +SKIP
>>> source.load(["model.norm.weight"])  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, did_you_mean
from nybble.core.guard import reading
from nybble.models.sources.side_files import copy_side_files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from nybble.qtensor import QTensor

MIB = 1 << 20
WHOLE_HASH_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a source knows of a tensor before reading it: shape, dtype after reading, and bytes on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


class ModelSource(ABC):
    """A model on disk, readable tensor by tensor under the names its transformers model uses.

    Attributes:
        spec: what the user typed.
        config: the transformers config; never built from code in the folder.
        streamable: False when the checkpoint must be converted as a whole (fused experts), so :meth:`load` first reads
            everything into memory once.
        note: why it isn't streamable, or another thing worth telling the user; else empty.
        aliases: whether :meth:`read` yields views of the file or of a cache, which the caller has to copy.
    """

    spec: str
    config: PreTrainedConfig
    streamable: bool
    note: str
    aliases: bool

    @abstractmethod
    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name in the model; of tied names, the one that is stored.

        Raises:
            ModelError: the file doesn't fit the config (shapes, missing tensors).
        """

    @abstractmethod
    def ties(self) -> Mapping[str, str]:
        """Tied names -> the name in :meth:`stored` whose tensor they share."""

    @abstractmethod
    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors (of :meth:`stored`) one at a time, on the CPU, in the file's dtype."""

    def packed_names(self) -> Collection[str]:
        """Those that the files pack, as :meth:`read_packed` gives them; :meth:`read` gives what they stand for."""
        return ()

    def read_packed(self, name: str) -> Sequence[QTensor]:
        """A packed weight with the codes and scales of the files: a QTensor [out, in], or one for each expert.

        Raises:
            FileError: the file can't be read, or holds numbers that can't be meant.
        """
        raise KeyError(name)

    def described_packed(self, name: str) -> Sequence[QTensor]:
        """What :meth:`read_packed` gives, on the meta device; numbers are read where they decide its form."""
        raise KeyError(name)

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model.

        Raises:
            ModelError: there is none, or it can't be built without running code.
        """

    def preprocessing(self) -> dict[str, Any]:
        """``preprocessor_config.json`` of a vision model; empty where the source has none."""
        return {}

    def side_files(self) -> Mapping[str, Path]:
        """What stands beside the weights and goes along as it is: name relative to the result's folder -> file."""
        return {}

    @abstractmethod
    def generation_config(self) -> GenerationConfig | None:
        """How the model's makers sample from it, where the source says so."""

    def write_side_files(self, folder: Path) -> str:
        """Write into ``folder`` what goes along beside the weights.

        Returns:
            what a later user will miss, in a line; else empty.

        Raises:
            FileError: a file can't be read or written.
        """
        copy_side_files(self.side_files(), folder)
        return ""

    @abstractmethod
    def weight_files(self) -> tuple[Path, ...]:
        """The files that define the model: weights and config."""

    def tensor_names(self) -> list[str]:
        """Names that :meth:`load` serves, each stored tensor once."""
        return list(self.stored())

    def bytes_of(self, names: Sequence[str], dtype: torch.dtype | None = None) -> int:
        """Bytes that the named tensors take in memory in ``dtype``, or on disk if that is None. Ties count once."""
        kept = {self.ties().get(name, name) for name in names}
        found = [self._known(name) for name in kept]
        return sum(t.nbytes if dtype is None else t.numel * dtype.itemsize for t in found)

    def load(
        self,
        names: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kept: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Read only the named tensors.

        Args:
            names: names in the model; a tied name gets the tensor that it shares.
            dtype: cast floating-point tensors to this; None keeps the file's (float32 for a quantized GGUF).
            device: where they go.
            kept: names that become float32 instead.

        Returns:
            New memory, nothing aliases the file; tied names share one tensor.

        Raises:
            ModelError: no such tensor.
            FileError: the file can't be read.
        """
        owner = {name: self.ties().get(name, name) for name in names}
        for name in owner.values():
            self._known(name)
        loaded: dict[str, Tensor] = {}
        tensors = self.read(list(dict.fromkeys(owner.values())))
        while True:
            with reading(self.spec):
                item = next(tensors, None)
            if item is None:
                break
            name, tensor = item
            wanted = torch.float32 if name in kept else dtype
            target = wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype
            loaded[name] = tensor.to(device=device, dtype=target, copy=self.aliases)
        return {name: loaded[stored] for name, stored in owner.items()}

    def fingerprint(self) -> str:
        """sha256 over the config and weight files: names, sizes and contents.

        Files up to 1 GiB are hashed whole. Of larger ones: the first 8 MiB (the header), the last MiB, and 62 samples
        of 1 MiB spread evenly; enough to tell models apart, not proof against an attacker.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        for path in sorted(self.weight_files(), key=lambda p: p.name):
            total.update(f"{path.name}\0{path.stat().st_size}\0{_content_hash(path)}\n".encode())
        return total.hexdigest()

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with parameters on the meta device and computed buffers real, in eval mode, weights tied."""
        from nybble.models.build.skeleton import fill_buffers_, meta_model

        known = self.stored()
        model = meta_model(self.config, dtype, known)
        fill_buffers_(model)
        generation = self.generation_config()
        if generation is not None and model.can_generate():
            model.generation_config = generation
        return model

    def held_open(self) -> AbstractContextManager[None]:
        """Files that are read in many small pieces stay open within."""
        return nullcontext()

    def outline(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with every tensor on the meta device, to be looked at: nobody changes it."""
        from nybble.models.build.skeleton import meta_model

        return meta_model(self.config, dtype, self.stored())

    def model(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The whole model as an ordinary float model in eval mode: nothing quantized, nothing patched."""
        from nybble.models.build.skeleton import kept_float32, unsaved

        model = self.skeleton(dtype)
        names = [*self.tensor_names(), *self.ties()]
        tensors = self.load(names, dtype=dtype, device=device, kept=kept_float32(model))
        unfit = model.load_state_dict(tensors, strict=False, assign=True)
        computed = unsaved(model)
        absent = [name for name in unfit.missing_keys if name not in self.ties() and name not in computed]
        if absent or unfit.unexpected_keys:
            raise ModelError(f"{self.spec}: tensors don't fit the model: {(absent + unfit.unexpected_keys)[:5]}.")
        model.tie_weights()  # assigning replaced one side of each tie
        nn.Module.to(model, device)
        return model

    def _known(self, name: str) -> StoredTensor:
        found = self.stored().get(name)
        if found is None:
            raise ModelError(f"{self.spec} has no tensor {name!r}.{did_you_mean(name, self.stored())[:400]}")
        return found


def called(spec: str) -> str:
    """What people call a model: a hub id or a demo's name as it is, of a path the last part, of the hub's cache the id.

    >>> called("HuggingFaceTB/SmolLM2-135M"), called("/data/models/Llama-3.gguf")
    ('HuggingFaceTB/SmolLM2-135M', 'Llama-3.gguf')
    >>> called("/cache/models--HuggingFaceTB--SmolLM2-135M/snapshots/12fd25f")
    'HuggingFaceTB/SmolLM2-135M'
    """
    path = Path(spec).absolute()
    if path.name in ("", ".."):
        path = path.resolve()
    if not (path.exists() or Path(spec).is_absolute() or spec.count("/") > 1):
        return spec
    cached = next((part for part in path.parts if part.startswith("models--")), "")
    return cached.removeprefix("models--").replace("--", "/") or path.name


def _content_hash(path: Path) -> str:
    """The part of a file that :meth:`ModelSource.fingerprint` describes, as sha256."""
    size = path.stat().st_size
    with reading(path), path.open("rb") as file:
        if size <= WHOLE_HASH_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(8 * MIB))
        for sample in range(1, 64):
            file.seek((size - MIB) * sample // 63)
            digest.update(file.read(MIB))
        return digest.hexdigest()
