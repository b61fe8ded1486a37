"""A folder as transformers saves it: config.json, safetensors (sharded or not), tokenizer files."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.core.dtypes import FLOATS, float_dtype
from nybble.core.errors import FileError, ModelError
from nybble.core.guard import reading
from nybble.core.tensorheader import TensorEntry, data_start, read_tensor_header
from nybble.models.adapter import checkpoint_renames
from nybble.models.build.config_file import make_config, read_json
from nybble.models.build.skeleton import base_class, expected_tensors, meta_model, model_class, unsaved
from nybble.models.named import STATED, check_float, is_packed, stated_quantization
from nybble.models.own import as_own
from nybble.models.sources import ModelSource, StoredTensor
from nybble.models.sources.fused import Fused, made_of
from nybble.models.sources.layouts import Files, PackedWeight, packed_weights
from nybble.models.sources.layouts._rounded import Rounded
from nybble.models.sources.left_over import SWITCHES, LeftOver, left_over
from nybble.models.sources.match import Match, match_names
from nybble.models.sources.side_files import GENERATION, is_tokenizer_file, left_behind, side_files
from nybble.models.sources.stored import DTYPES, OpenFiles, empty_tensor, read_tensor
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.rotation import BlockRotation
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
INDEX = f"model{INDEX_ENDING}"
NAMED = "transformers_weights"  # key of config.json
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path, named: object = None) -> dict[str, tuple[Path, TensorEntry]]:
    """Tensor name -> the safetensors file that holds it and its header entry; every header is checked.

    As transformers does, ``model.safetensors`` is taken before an index where both are there.

    Args:
        folder: the model's.
        named: ``transformers_weights`` of its config.json, the name of the file or index to take.

    Raises:
        ModelError: no safetensors here, or several and no index; pickles are named, with the way to convert them.
        FileError: a header or the index is malformed, or a shard is missing.
    """
    if named is not None:
        if (
            not isinstance(named, str)
            or Path(named).name != named
            or not named.endswith((".safetensors", INDEX_ENDING))
        ):
            raise FileError(f"{folder}: config.json says that the weights are in {named!r:.80}, which is no such file.")
        return _sharded(folder / named) if named.endswith(INDEX_ENDING) else _whole(folder / named)
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return _sharded(folder / INDEX)
    found = sorted(folder.glob("*.safetensors"))
    single = [p for p in found if p.name == SINGLE] or found
    if len(single) > 1:
        raise ModelError(f"{folder} has {len(single)} safetensors files and no {INDEX} to say which tensor is where.")
    if not single:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ModelError(
                f"{folder} keeps its weights in {pickles[0]}, a pickle, which can run code and is never loaded. If you "
                f"trust it, convert it once: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW)"
            )
        raise ModelError(f"{folder} has a config.json and no .safetensors file.")
    return _whole(single[0])


PREPROCESSOR = "preprocessor_config.json"
_NUMBER = 8  # bytes at most


def read_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; no code of it runs. Errors are transformers' own.

    Raises:
        FileError: the folder has no file of one; transformers would make up an empty one for some models.
    """
    from transformers import AutoTokenizer

    if not any(is_tokenizer_file(name) for name in side_files(folder)):
        raise FileError(
            f"{folder} holds no tokenizer. Put one beside the weights (tokenizer.save_pretrained(folder)); in Python, "
            "data as token ids or samples needs none."
        )

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(folder), config=config, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """What preprocessor_config.json says, if there is one."""
    path = folder / PREPROCESSOR
    return read_json(path) if path.is_file() else {}


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What generation_config.json says, if there is one; unchanged, it can be saved again whatever it says.

    Raises:
        FileError: it isn't one.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION
    if not path.is_file():
        return None
    with reading(path):
        read_json(path)
        config: GenerationConfig = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return config


def _whole(file: Path) -> dict[str, tuple[Path, TensorEntry]]:
    return {name: (file, info) for name, info in read_tensor_header(file).tensors.items()}


def _sharded(place: Path) -> dict[str, tuple[Path, TensorEntry]]:
    weight_map = read_json(place).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{place} has no weight_map.")
    headers: dict[str, Mapping[str, TensorEntry]] = {}
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for name, file in weight_map.items():
        # A shard is a sibling of its index: a path could point anywhere on the disk.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FileError(f"{place}: {name!r} is said to be in {file!r}, which is not the name of a shard.")
        if file not in headers:
            headers[file] = read_tensor_header(place.parent / file).tensors
        if name not in headers[file]:
            raise FileError(f"{place}: {name!r} is not in {file}.")
        tensors[name] = (place.parent / file, headers[file][name])
    return tensors


def _same_bytes(made: Sequence[QTensor], stored: Mapping[str, Tensor]) -> dict[tuple[int, str], str]:
    """Which tensors of a packed weight are stored ones under another shape or dtype: those that share their memory.

    Args:
        made: its QTensors, made of ``stored``.
        stored: role -> tensor on the meta device.

    Returns:
        number of the QTensor and name of its tensor -> role.
    """
    places = {tensor.untyped_storage()._cdata: role for role, tensor in stored.items()}
    found: dict[tuple[int, str], str] = {}
    for number, one in enumerate(made):
        for name, tensor in one.tensors().items():
            role = places.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None
            whole = role is not None and tensor.is_contiguous() and tensor.nbytes == stored[role].nbytes
            if role is not None and whole and not tensor.is_conj() and not tensor.is_neg():
                found[number, name] = role
    return found


def is_converted(model: PreTrainedModel, unused: Iterable[str]) -> bool:
    """Whether transformers has rules to make this model's tensors out of ``unused`` ones with other names.

    Those are its weight conversions (experts fused while loading) and BERT's old ``gamma`` and ``beta``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model, add_legacy=False)
    return any(rules or name.endswith((".gamma", ".beta")) for name in unused)


def converted_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What transformers makes of stored tensors: names in ``model`` that they become, or become a part of."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    names = list(names)
    if not names:
        return {}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    return {n: rename_source_key(n, renamings, converters, model.base_model_prefix, expected)[0] for n in names}


class FolderSource(ModelSource):
    """Safetensors in a folder. Only the tensors asked for are read, through the system's page cache.

    What another library has quantized is served as the float model that it stands for, in float32;
    :meth:`read_packed` gives its QTensors.
    """

    def __init__(self, spec: str, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.aliases = True
        raw = as_own(read_json(folder / "config.json"), folder)
        quantization = stated_quantization(folder, raw)
        if is_packed(quantization):
            raw = {key: value for key, value in raw.items() if key not in STATED}
        self.config = make_config(raw, str(folder / "config.json"))
        self._files = weight_files(folder, raw.get(NAMED))
        if not self._files:
            raise ModelError(f"{spec} has no tensors.")
        self._held: OpenFiles | None = None
        self.packed: dict[str, PackedWeight] = {}
        self._descriptions: dict[tuple[str, Any], Sequence[QTensor]] = {}
        self._same_bytes: dict[str, Mapping[tuple[int, str], str]] = {}
        self._same_alike: dict[tuple[str, Any], Mapping[tuple[int, str], str]] = {}
        self.rounded, self._tensors = Rounded(), self._files
        if is_packed(quantization):
            self._unpack(quantization)
        self._converted: dict[str, Tensor] | None = None
        self._fused: dict[str, Fused] = {}
        self._headless = ""

    def _unpack(self, quantization: Any) -> None:
        """Have each packed weight in the place of the tensors that it is made of."""
        files = Files(self.spec, {name: entry for name, (_, entry) in self._files.items()}, self._file_tensor)
        with self.held_open():
            self.packed, self.rounded = packed_weights(quantization, files)
        parts = {part for weight in self.packed.values() for part in weight.parts.values()} | self.rounded.used
        parts |= self.rounded.matrices
        self._tensors = {name: found for name, found in self._files.items() if name not in parts}
        for name, weight in self.packed.items():
            held = [self._files[part] for part in weight.parts.values()]
            size = sum(entry.nbytes for _, entry in held)
            entry = TensorEntry(dtype="F32", shape=weight.shape, begin=0, nbytes=size)
            self._tensors[name] = (held[0][0], entry)

    def _file_tensor(self, name: str) -> Tensor:
        """A tensor as it is stored, in memory of its own."""
        path, entry = self._files[name]
        return self.read_at(path, self._starts[path] + entry.begin, name, entry)

    def read_at(self, path: Path, begin: int, name: str, entry: TensorEntry) -> Tensor:
        """What stands in a file, as :meth:`packed_at` and :meth:`stored_at` say; in memory of its own."""
        if self._held is not None:
            return self._held.read(path, begin - entry.begin, name, entry)
        return read_tensor(path, begin - entry.begin, name, entry)

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """The files stay open within."""
        with OpenFiles() as self._held:
            try:
                yield
            finally:
                self._held = None

    def _empty_tensor(self, name: str) -> Tensor:
        """A tensor as it is stored, on the meta device."""
        return empty_tensor(name, self._files[name][1])

    def packed_names(self) -> Mapping[str, PackedWeight]:
        """The packed weights by their name in the model; of experts in one parameter those that are all packed."""
        return self._packed_names if self.packed else {}

    @cached_property
    def _packed_names(self) -> dict[str, PackedWeight]:
        return {name: weight for name, file in self._match.files.items() if (weight := self._whole(file)) is not None}

    def _whole(self, file: str) -> PackedWeight | None:
        """A packed weight by its name in the files, or one that several of them make up."""
        return self._fused[file].packed(file, self.packed) if file in self._fused else self.packed.get(file)

    def activations(self, name: str, side: str) -> ActivationQuantizer | None:
        """The quantizer of ``inputs`` or ``outputs`` beside a packed weight, by the weight's name in the model.

        Raises:
            FileError: numbers that can't be meant.
        """
        found = getattr(self.rounded, side).get(self._match.files[name].removesuffix(".weight"))
        if found is None:
            return None
        with reading(f"the {side} of {name}"):
            return ActivationQuantizer(Quantizer(found.line), found.params(self._file_tensor))

    def rotation(self, name: str) -> BlockRotation | None:
        """What rotates the input of a packed weight, by the weight's name in the model; None where nothing does.

        Raises:
            FileError: its matrix can't be read, or isn't orthogonal.
        """
        found = self.packed_names()[name].rotation
        return None if found is None else found.made(self._file_tensor)

    def read_packed(self, name: str) -> Sequence[QTensor]:
        """A packed weight, by its name in the model: a QTensor [out, in], or one for each expert.

        Raises:
            FileError: the file can't be read, or holds numbers that can't be meant.
        """
        return self.packed_names()[name].made(self._file_tensor)

    def described_packed(self, name: str) -> Sequence[QTensor]:
        """What :meth:`read_packed` gives, on the meta device; numbers are read where they decide its form."""
        found, self._same_bytes[name] = self._described(
            self.packed_names()[name], joined=self._match.files[name] in self._fused
        )
        return found

    def described_stored(self, file: str) -> Sequence[QTensor]:
        """The same of a weight of :attr:`packed`, by its name there."""
        return self._described(self.packed[file], joined=False)[0]

    def _described(self, weight: PackedWeight, joined: bool) -> tuple[Sequence[QTensor], Mapping[tuple[int, str], str]]:
        """On the meta device; and which of its tensors are stored as they are, by the role that their bytes have."""
        entries = tuple(
            (role, self._files[at][1].dtype, tuple(self._files[at][1].shape)) for role, at in weight.parts.items()
        )
        build: Any = weight.build  # of alike weights one partial application for each, with equal arguments
        alike = (str(build), entries)
        if alike in self._descriptions:
            return self._descriptions[alike], self._same_alike[alike]
        seen: list[str] = []

        def read(part: str) -> Tensor:
            seen.append(part)
            return self._file_tensor(part)

        def empty(part: str) -> Tensor:
            # Matrices that are joined share what is one number for each, or stand side by side.
            joins = joined and self._files[part][1].nbytes <= _NUMBER
            return read(part) if joins else self._empty_tensor(part)

        handed: dict[str, Tensor] = {}
        found = weight.described(lambda part: handed.setdefault(part, empty(part)), read)
        roles = {part: role for role, part in weight.parts.items()}
        kept = {roles[part]: tensor for part, tensor in handed.items() if tensor.is_meta}
        same = _same_bytes(found, kept)
        if not seen:  # no numbers of its own decide
            self._descriptions[alike], self._same_alike[alike] = found, same
        return found, same

    def packed_at(self, name: str, number: int, tensor: str) -> tuple[Path, int, TensorEntry] | None:
        """Where the bytes of a tensor of a packed weight are in the files; None where it is made of them.

        Args:
            name: of the weight in the model; :meth:`described_packed` was asked for it.
            number: of its QTensor.
            tensor: a name of that one's tensors.
        """
        role = self._same_bytes[name].get((number, tensor))
        if role is None:
            return None
        return self._part_at(self.packed_names()[name].parts[role])

    def filed_at(self, name: str, form: str, role: str) -> tuple[Path, int, TensorEntry] | None:
        """Where a packed weight's part is in files of a form of its library's; None where they have another form.

        Args:
            name: of the weight in the model.
            form: as :class:`PackedWeight` has it.
            role: of the part.
        """
        weight = self.packed_names()[name]
        return self._part_at(weight.parts[role]) if weight.form == form else None

    def _part_at(self, file_name: str) -> tuple[Path, int, TensorEntry]:
        path, entry = self._files[file_name]
        return path, self._starts[path] + entry.begin, entry

    def stored_at(self, name: str) -> tuple[Path, int, TensorEntry] | None:
        """Where the bytes of a tensor of the model begin, and what they are; None where it is made of others."""
        file = self._match.files.get(name)
        if not self.streamable or file is None or file in self.packed or file in self._fused:
            return None
        path, entry = self._files[file]
        return path, self._starts[path] + entry.begin, entry

    @cached_property
    def _starts(self) -> dict[Path, int]:
        return {path: data_start(path) for path in {path for path, _ in self._files.values()}}

    @property
    def streamable(self) -> bool:  # type: ignore[override]
        """Whether every tensor of the model is one tensor of the files."""
        return not self._match.missing

    @property
    def note(self) -> str:  # type: ignore[override]
        """Why it is not streamable, what of the files is not read; or empty."""
        return " ".join(self.notes())

    def notes(self, in_float: bool = True) -> list[str]:
        """The sentences of :attr:`note`; ``in_float``: what the model rounds and its float model doesn't, too."""
        streamable = self.streamable
        said = [self._headless] if self._headless else []
        if not streamable:
            said.append(
                f"{self.config.model_type} checkpoints are converted while loading (no stored tensor is "
                f"{self._match.missing[0]}), so the whole model is read into memory."
            )
        files = {path.name for path, _ in self._files.values()}
        if SINGLE in files and (self.folder / INDEX).is_file():
            said.append(f"{SINGLE} and {INDEX} are both there; {SINGLE} is read, as transformers does.")
        if self.rounded.left:
            said.append(self.rounded.left)
        asked = [w for w, asked in (("activations", self.rounded.inputs), ("the KV cache", self.rounded.kv)) if asked]
        if asked and in_float:
            said.append(f"The checkpoint rounds {' and '.join(asked)} too, which its float model does not.")
        pieces = (name for fused in self._fused.values() for name in fused.names())
        if any(name.removesuffix(".weight") in self.rounded.inputs for name in pieces):
            said.append("It asks for rounded inputs of fused experts, too; here those stay in float.")
        others = self._left.others
        if others:
            said.append(f"{len(others)} stored tensors have no place in the model and are left out, {others[0]} first.")
        return said

    @cached_property
    def _match(self) -> Match:
        check_float(self.spec, getattr(self.config, "quantization_config", None))
        shapes = {name: tuple(info.shape) for name, (_, info) in self._tensors.items()}
        renames = checkpoint_renames(self.config)
        match = self._match_with(shapes, renames)
        if any(not self._same(a, b) for a, b in self._stored_twice(match, shapes)):
            # The config says tied, the file disagrees: the file is right (transformers decides so too).
            self.config.tie_word_embeddings = False
            match = self._match_with(shapes, renames)
        found = match if self._complete(match) else self._match_base(shapes, renames)
        if found is None:
            raise ModelError(f"{self.spec} lacks {len(match.missing)} tensors, {match.missing[0]} first.")
        return self._put_together(found)

    def _put_together(self, match: Match) -> Match:
        """The match with what the files have in pieces or under other names, if that is all that it lacks."""
        if not match.missing:
            return match
        shapes = {name: tuple(info.shape) for name, (_, info) in self._tensors.items()}
        direct, fused = made_of(self._expected, match, expected_tensors(self._expected), shapes)
        if not set(match.missing) <= direct.keys() | fused.keys():
            return match
        self._fused = fused
        for name, found in fused.items():
            held = [self._tensors[piece] for piece in found.names()]
            dtypes = {entry.dtype for _, entry in held}
            dtype, nbytes = dtypes.pop() if len(dtypes) == 1 else "F32", sum(entry.nbytes for _, entry in held)
            self._tensors[name] = (held[0][0], TensorEntry(dtype=dtype, shape=found.shape, begin=0, nbytes=nbytes))
        used = {*direct.values(), *(piece for found in fused.values() for piece in found.names())}
        files = {**match.files, **direct, **{name: name for name in fused}}
        return replace(match, files=files, missing=(), unused=tuple(name for name in match.unused if name not in used))

    def _complete(self, match: Match) -> bool:
        """Whether the file has all of the model, as it is or to be converted."""
        made = set(converted_names(self._expected, match.unused).values())
        prefix = f"{self._expected.base_model_prefix}."
        head = [n for n in match.missing if hasattr(self._expected, prefix[:-1]) and not n.startswith(prefix)]
        return made.issuperset(head) and (not match.missing or is_converted(self._expected, match.unused))

    def _match_base(self, shapes: Mapping[str, tuple[int, ...]], renames: Mapping[str, str]) -> Match | None:
        """The match of the model without a head, where the files have that: AutoModel reads it; changes the config."""
        base, named = base_class(self.config), self.config.architectures
        if base is None:
            return None
        self.config.architectures = [base.__name__]
        match = self._match_with(shapes, renames)
        if self._complete(match):
            self._headless = f"The files have no head of the model that config.json names; read as {base.__name__}."
            return match
        self.config.architectures = named
        return None

    @cached_property
    def _left(self) -> LeftOver:
        """What the model has no place for.

        Raises:
            ModelError: it can't be right without them.
        """
        missing = {*self._match.missing, *self._match.ties}
        made = converted_names(self._expected, self._match.unused)
        left = left_over(self._expected, {file: name for file, name in made.items() if name not in missing})
        if left.blocks:
            raise ModelError(
                f"{self.spec}: {left.blocks[0]} is of a block behind the last one that config.json asks for. If the "
                "file is right, num_hidden_layers (or what the family calls it) is too small."
            )
        lost = next((name for name, t in self._from_files(left.biases) if t.count_nonzero()), None)
        if lost is not None:
            raise ModelError(
                f"{self.spec}: the file has {lost}, and the module has no bias as config.json describes it: the model "
                f"would compute something else. If the file is right, config.json lacks {SWITCHES}."
            )
        return left

    def _match_with(self, shapes: Mapping[str, tuple[int, ...]], renames: Mapping[str, str]) -> Match:
        stated = str(self.config.dtype).removeprefix("torch.")
        self._expected = meta_model(
            self.config, float_dtype(stated if stated in FLOATS else "float32", "dtype"), shapes
        )
        prefix = self._expected.base_model_prefix
        match = match_names(expected_tensors(self._expected), shapes, prefix, renames)
        return replace(match, missing=tuple(n for n in match.missing if n not in unsaved(self._expected)))

    def _stored_twice(self, match: Match, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
        """Names in the files of two tensors that the config ties, whatever the files call them."""
        renamed = {name: file for file, name in converted_names(self._expected, match.unused).items()}
        files = {name: name for name in shapes} | renamed | dict(match.files)
        return [(files[tied], files[kept]) for tied, kept in match.ties.items() if tied in files and kept in files]

    def _same(self, first: str, second: str) -> bool:
        a, b = (tensor for _, tensor in self._from_files([first, second]))
        return torch.equal(a, b)

    def _from_files(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their name in the files."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                if name in self._fused:
                    yield name, self._fused[name].values(self._from_files, self._dtype(name))
                    continue
                if name in self.packed:
                    yield name, self.packed[name].values(self._file_tensor)
                    continue
                path = self._tensors[name][0]
                with reading(path):
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                    tensor = opened[path].get_tensor(name)
                yield name, tensor

    def _dtype(self, file_name: str, expected: Tensor | None = None) -> torch.dtype:
        """Of a stored tensor; where the model has a float one (``expected``), it has to be float too."""
        name = self._tensors[file_name][1].dtype
        found = DTYPES.get(name)
        wanted = expected is not None and expected.is_floating_point()
        if found is None or (wanted and not found.is_floating_point):
            raise ModelError(f"{self.spec}: {file_name} has dtype {name}, which is not a float model's.")
        return found

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        match, _ = self._match, self._left
        if not match.missing:
            expected = expected_tensors(self._expected)
            return {
                name: StoredTensor(
                    shape=tuple(self._tensors[file][1].shape),
                    dtype=self._dtype(file, expected[name]),
                    nbytes=self._tensors[file][1].nbytes,
                )
                for name, file in match.files.items()
            }
        dtype = self._main_dtype()
        return {
            name: StoredTensor(shape=tuple(t.shape), dtype=dtype, nbytes=t.numel() * dtype.itemsize)
            for name, t in expected_tensors(self._expected).items()
            if name not in match.ties
        }

    def _main_dtype(self) -> torch.dtype:
        """The dtype that most elements are stored in."""
        bytes_by_dtype = Counter[torch.dtype]()
        for name, (_, info) in self._tensors.items():
            bytes_by_dtype[self._dtype(name)] += info.nbytes
        return bytes_by_dtype.most_common(1)[0][0]

    def _convert(self) -> dict[str, Tensor]:
        """Let transformers convert the whole checkpoint to the model's layout."""
        with reading(self.spec, ModelError):
            # Our own tensors and config, no path: nothing else in the folder (adapters, code) is looked at.
            cls: Any = model_class(self.config)
            model, info = cls.from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=dict(self._from_files(list(self._tensors))),
                dtype=self._main_dtype(),
                output_loading_info=True,
            )
        wrong = [*info["missing_keys"], *info["mismatched_keys"], *info.get("error_msgs", ())]
        if wrong:
            raise ModelError(f"{self.spec}: the checkpoint doesn't fit the model: {wrong[:3]}.")
        return {name: t.detach() for name, t in expected_tensors(model).items()}

    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the model; of one that is converted while loading, what it will be."""
        return self._stored

    def outline(self, dtype: torch.dtype) -> PreTrainedModel:
        """The one that names were matched with, in the dtype that the config states."""
        known = bool(self.stored()) and self._expected.dtype == dtype
        return self._expected if known else super().outline(dtype)

    def ties(self) -> Mapping[str, str]:
        """Tied names that the files leave out, or repeat."""
        return self._match.ties

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Views of the files; of a converted model, its own tensors."""
        if self.streamable:
            for name in names:
                yield from ((name, tensor) for _, tensor in self._from_files([self._match.files[name]]))
            return
        if self._converted is None:
            self._converted = self._convert()
        for name in names:
            yield name, self._converted[name]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As the folder's tokenizer files say."""
        with reading(f"the tokenizer of {self.spec}", ModelError):
            return read_tokenizer(self.folder, self.config)

    def preprocessing(self) -> dict[str, Any]:
        """As preprocessor_config.json says, if there is one."""
        return read_preprocessing(self.folder)

    def side_files(self) -> Mapping[str, Path]:
        """Those that the folder has."""
        return side_files(self.folder)

    def write_side_files(self, folder: Path) -> str:
        """As they came; names what a sentence encoder needs and can't be passed on."""
        super().write_side_files(folder)
        behind = left_behind(self.folder)
        if not behind:
            return ""
        names = f"{behind[0]}, and {len(behind) - 1} more" if len(behind) > 1 else behind[0]
        return (
            f"left behind: {names} (pickles and code are not passed on). Save it as safetensors first, or sentences "
            "come to other vectors."
        )

    def generation_config(self) -> GenerationConfig | None:
        """From generation_config.json, if there is one."""
        return read_generation_config(self.folder)

    def weight_files(self) -> tuple[Path, ...]:
        """config.json and every shard."""
        return (self.folder / "config.json", *sorted({path for path, _ in self._files.values()}))
