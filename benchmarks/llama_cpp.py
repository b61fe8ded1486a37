"""llama.cpp, the library that the package xllamacpp carries, through its C interface: logits, and what products got.

    pip install --target PEER xllamacpp

One thread on a CPU. As it comes, llama.cpp keeps keys and values in float16 and may fuse attention (flash attention),
which adds them up in float16 too. With ``exact`` both are in float32, as nybble's are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
F32, F16 = 0, 1


class _ModelParams(ctypes.Structure):
    """At least as large as llama_model_params, whose fields aren't touched."""

    _fields_ = (("room", ctypes.c_char * 1024),)


class _ContextParams(ctypes.Structure):
    """llama_context_params up to what is set here, and room for the rest."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("context", "batch", "micro_batch", "sequences")),
        *((name, ctypes.c_int32) for name in ("recurrent", "outputs", "outputs_each", "threads", "threads_batch")),
        *((name, ctypes.c_int32) for name in ("kind", "rope_scaling", "pooling", "attention", "flash_attention")),
        ("rope", ctypes.c_float * 6),
        ("original_context", ctypes.c_int32),
        ("defragment", ctypes.c_float),
        ("callback", ctypes.c_void_p),
        ("callback_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("room", ctypes.c_char * 1024),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embedding", "position", "sequences", "sequence", "logits")),
    )


class _Tensor(ctypes.Structure):
    """ggml_tensor of ggml.h."""


_Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)


class _CpuTraits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("rows", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Product:
    """A product with a weight, as it was computed.

    Attributes:
        weight: GGUF's name of it. inputs: float32 [tokens, columns]. outputs: float32 [tokens, rows].
    """

    weight: str
    inputs: Array
    outputs: Array


def library() -> ctypes.CDLL:
    """The shared object, its functions declared."""
    import xllamacpp

    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    found.llama_model_default_params.restype = _ModelParams
    found.llama_context_default_params.restype = _ContextParams
    found.llama_model_load_from_file.restype = found.llama_init_from_model.restype = ctypes.c_void_p
    found.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _ModelParams)
    found.llama_init_from_model.argtypes = (ctypes.c_void_p, _ContextParams)
    found.llama_batch_get_one.restype = _Batch
    found.llama_batch_get_one.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    found.llama_decode.argtypes = (ctypes.c_void_p, _Batch)
    found.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    for name in ("llama_get_logits", "llama_free", "llama_model_free", "llama_model_get_vocab"):
        getattr(found, name).argtypes = (ctypes.c_void_p,)
    found.llama_model_get_vocab.restype = ctypes.c_void_p
    found.llama_set_n_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
    found.llama_tokenize.argtypes = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32,
        ctypes.c_bool, ctypes.c_bool,
    )  # fmt: skip
    found.ggml_op_name.restype = ctypes.c_char_p
    found.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    found.ggml_cpu_init()
    return found


def rounded_rows(number: int, x: Array, nbytes: int) -> tuple[int, Array]:
    """What a product with weights of type ``number`` makes of its inputs: its type, and the bytes.

    Args:
        number: ggml's, of the weights.
        x: float32, whole blocks.
        nbytes: how many the result has.
    """
    traits = library().ggml_get_type_traits_cpu
    kind = traits(number).contents.vec_dot_type
    x, out = np.ascontiguousarray(x, np.float32), np.zeros(nbytes, np.uint8)
    traits(kind).contents.from_float(x.ctypes.data, out.ctypes.data, x.size)
    return kind, out


class LlamaCpp:
    """A GGUF in llama.cpp.

    Args:
        path: of the file. exact: keys and values in float32, attention not fused; else as llama.cpp comes.
    """

    def __init__(self, path: Path, *, exact: bool = True) -> None:
        self._library, self._exact = library(), exact
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._library.llama_log_set(self._log, None)
        self._library.llama_backend_init()
        params = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp can't load {path.name}")

    def _context(self, callback: Any = None) -> Any:
        params = self._library.llama_context_default_params()
        known = (params.context, params.batch, params.flash_attention, params.type_k, params.type_v)
        if known != (512, 2048, -1, F16, F16):
            raise SystemExit(f"this llama.cpp's llama_context_params are laid out otherwise: {known}")
        if self._exact:
            params.flash_attention, params.type_k, params.type_v = 0, F32, F32
        if callback is not None:
            params.callback = ctypes.cast(callback, ctypes.c_void_p)
        context = self._library.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit("llama.cpp makes no context")
        self._library.llama_set_n_threads(context, 1, 1)
        return context

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, special ones as the file asks."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        vocab = self._library.llama_model_get_vocab(self._model)
        return list(room[: self._library.llama_tokenize(vocab, data, len(data), room, len(room), True, False)])

    def logits(self, parts: Iterator[Sequence[int]], vocabulary: int, callback: Any = None) -> Iterator[Array]:
        """Of each token of each part, float32 [tokens, vocabulary]; a part follows the one before."""
        context = self._context(callback)
        try:
            for part in parts:
                tokens, wanted = np.array(part, np.int32), np.ones(len(part), np.int8)
                batch = self._library.llama_batch_get_one(tokens.ctypes.data, len(part))
                batch.logits = wanted.ctypes.data
                if self._library.llama_decode(context, batch):
                    raise SystemExit("llama.cpp can't decode")
                yield np.ctypeslib.as_array(self._library.llama_get_logits(context), (len(part), vocabulary)).copy()
        finally:
            self._library.llama_free(context)

    def greedy(self, ids: Sequence[int], count: int, vocabulary: int) -> tuple[list[int], Array]:
        """The ``count`` tokens that follow, and the logits that each was chosen by, [count, vocabulary]."""
        found: list[int] = []
        rows: list[Array] = []

        def parts() -> Iterator[Sequence[int]]:
            yield ids
            while len(found) < count:
                yield found[-1:]

        for logits in self.logits(parts(), vocabulary):
            rows.append(logits[-1])
            found.append(int(logits[-1].argmax()))
        return found[:count], np.stack(rows[:count])

    def products(self, ids: Sequence[int], vocabulary: int) -> list[Product]:
        """Every product with a weight of the file that one run over ``ids`` makes."""
        found: list[Product] = []

        def seen(tensor: Any, asked: bool, _: Any) -> bool:
            node = tensor.contents
            wanted: bool = self._library.ggml_op_name(node.op) == b"MUL_MAT" and node.src[0].contents.name.endswith(
                b".weight"
            )
            if wanted and not asked:
                found.append(Product(node.src[0].contents.name.decode(), _values(node.src[1].contents), _values(node)))
            return wanted or not asked

        list(self.logits(iter([ids]), vocabulary, _CALLBACK(seen)))
        return found

    def close(self) -> None:
        """Free the model."""
        self._library.llama_model_free(self._model)


def _values(tensor: Any) -> Array:
    """A float32 matrix [rows, columns], copied."""
    columns, rows = tensor.ne[0], tensor.ne[1]
    assert tensor.type == F32 and tensor.nb[0] == 4 and tensor.nb[1] == 4 * columns
    place = ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(place, (rows, columns)).copy()
