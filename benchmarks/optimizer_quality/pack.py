"""The study's data as one file: token ids and images, split, so that it can travel to a machine without a network.

:func:`pack` makes it out of the sources, :func:`read` gives its arrays: a zip of ``NAME.npy.xz`` and ``about.json``.
Splits go by what belongs together: all packages of one source, all translations of one English string.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import zipfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nybble.core.files import atomic_write_bytes

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
LM_TOKENS = 21_000_000  # of 24.7M that the ladder has
IMAGES = 30_000  # of 60,000 to train on; all 10,000 judge
SUMMARY, DESCRIPTION, SENTENCE = 24, 96, 40  # tokens; longer texts are cut, longer sentences left out
WORDS = 8192  # vocabulary of the translations
PAD = 0  # of every vocabulary
LEAST = 100  # packages of a section that is a class
HELD_OUT = 16  # of so many sources or strings one judges


def pack(file: Path, raw: Path, ladder: Path, fashion: Path) -> dict[str, Any]:
    """Write the file; return what about.json says.

    Args:
        file: to write.
        raw: where lists and packages are downloaded to.
        ladder: the folder of benchmarks/ladder, which is made if it isn't there.
        fashion: the folder with Fashion-MNIST's four files.
    """
    from benchmarks.ladder.text import prepare
    from transformers import PreTrainedTokenizerFast

    about: dict[str, Any] = {"text": prepare(ladder)["packages"]}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ladder / "tokenizer").backend_tokenizer
    arrays: Arrays = {}
    for more, said in (language(ladder), packages(raw, tokenizer), translations(raw), images(fashion)):
        arrays |= more
        about |= said
    about["sha256"] = {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in arrays.items()}
    with ThreadPoolExecutor() as pool:  # lzma lets go of the lock
        packed = list(pool.map(compressed, arrays.values()))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in zip(arrays, packed, strict=True):
            archive.writestr(zipfile.ZipInfo(f"{name}.npy.xz"), part)
        archive.writestr(zipfile.ZipInfo("about.json"), json.dumps(about, indent=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(file, content.getvalue())
    return about


def compressed(x: Array) -> bytes:
    """A .npy in xz; of 16-bit ids it knows which byte comes next."""
    array = io.BytesIO()
    np.save(array, x)
    lp = x.itemsize // 2
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4 - lp, "lp": lp, "pb": lp}]
    return lzma.compress(array.getvalue(), filters=filters)


def read(file: Path, *prefixes: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays whose names begin so, and about.json."""
    try:
        with zipfile.ZipFile(file) as archive:
            about = json.loads(archive.read("about.json"))
            names = [name for name in archive.namelist() if name.startswith(prefixes) and name.endswith(".npy.xz")]
            arrays = {
                name.removesuffix(".npy.xz"): np.load(
                    io.BytesIO(lzma.decompress(archive.read(name))), allow_pickle=False
                )
                for name in names
            }
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{file} is no file of --pack: {error}") from None
    return arrays, about


# -------------------------------------------------------------------------------------------------------- what is in
def judges(name: str) -> bool:
    """Whether what belongs to this name is held out."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def ragged(name: str, rows: Iterable[list[int]], longest: int) -> Arrays:
    """Rows cut to ``longest``: ``NAME.ids`` one behind another, ``NAME.lengths``."""
    cut = [row[:longest] for row in rows]
    ids = np.fromiter((i for row in cut for i in row), dtype="<u2")
    return {f"{name}.ids": ids, f"{name}.lengths": np.array([len(row) for row in cut], dtype="<u2")}


def padded(arrays: Arrays, name: str, width: int) -> Array:
    """The inverse: int64 [rows, width]."""
    lengths = arrays[f"{name}.lengths"].astype(np.int64)
    out = np.full((len(lengths), width), PAD, dtype=np.int64)
    out[np.arange(width) < lengths[:, None]] = arrays[f"{name}.ids"]
    return out


def language(ladder: Path) -> tuple[Arrays, dict[str, Any]]:
    """The ladder's text."""
    from benchmarks.ladder.text import VOCABULARY, read_ids

    ids = {"lm.train": read_ids(ladder, "train")[:LM_TOKENS], "lm.held": read_ids(ladder, "held-out")}
    return ids, {"vocabulary": VOCABULARY, "tokens": {name: len(x) for name, x in ids.items()}}


def packages(raw: Path, tokenizer: Any) -> tuple[Arrays, dict[str, Any]]:
    """Summaries, descriptions, sections, the split, and which package stands for its source in pairs."""
    from benchmarks.optimizer_quality import sources

    found = sources.descriptions(raw)
    counts = Counter(package.section for package in found)
    sections = sorted(name for name, count in counts.items() if count >= LEAST)
    found = [package for package in found if package.section in sections]
    shortest: dict[str, str] = {}  # mostly the thing itself, and not its headers or its manual
    for package in sorted(found, key=lambda p: (len(p.name), p.name)):
        shortest.setdefault(package.source, package.name)
    arrays = {
        "packages.section": np.array([sections.index(p.section) for p in found], dtype=np.uint8),
        "packages.held": np.array([judges(p.source) for p in found]),
        "packages.one": np.array([shortest[p.source] == p.name for p in found]),
        **ragged("packages.summary", encoded(tokenizer, [p.summary for p in found]), SUMMARY),
        **ragged("packages.description", encoded(tokenizer, [p.description for p in found]), DESCRIPTION),
    }
    return arrays, {"sections": sections, "descriptions": len(found), "sources": len(shortest)}


def encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text."""
    return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def translations(raw: Path) -> tuple[Arrays, dict[str, Any]]:
    """English and the other language, which language, the split; a vocabulary of their own."""
    from benchmarks.ladder.text import train_tokenizer
    from benchmarks.optimizer_quality import sources

    pairs = [(there, en, to) for there, found in sources.translations(raw).items() for en, to in found]
    held = np.array([judges(en) for _, en, _ in pairs])
    known = [text for (_, en, to), judged in zip(pairs, held, strict=True) if not judged for text in (en, to)]
    tokenizer = train_tokenizer(sorted(known), WORDS).backend_tokenizer
    en, to = (encoded(tokenizer, [pair[i] for pair in pairs]) for i in (1, 2))
    fit = [i for i, both in enumerate(zip(en, to, strict=True)) if max(map(len, both)) <= SENTENCE]
    languages = [sources.LANGUAGES.index(pairs[i][0]) for i in fit]
    arrays = {
        "pairs.language": np.array(languages, dtype=np.uint8),
        "pairs.held": held[fit],
        **ragged("pairs.en", [en[i] for i in fit], SENTENCE),
        **ragged("pairs.to", [to[i] for i in fit], SENTENCE),
    }
    return arrays, {"languages": sources.LANGUAGES, "pairs": len(fit)}


def images(fashion: Path) -> tuple[Arrays, dict[str, Any]]:
    """Fashion-MNIST: the first images of the training part, and the test part."""
    from benchmarks.optimizer_quality import sources

    (x, y), (x_held, y_held) = sources.images(fashion, "train"), sources.images(fashion, "t10k")
    arrays = {"images.x": x[:IMAGES], "images.y": y[:IMAGES], "images.x_held": x_held, "images.y_held": y_held}
    return arrays, {"images": {name: len(part) for name, part in (("train", x[:IMAGES]), ("test", x_held))}}
