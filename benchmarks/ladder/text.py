"""The ladder's text: English out of Debian's documentation packages and dictionaries, split, and as token ids.

    python -m benchmarks.ladder.text build/ladder [--root FOLDER]

Trained on: the manuals of Python, PostgreSQL and the Linux kernel, three dictionaries. Every 50th document of these is
held out (``held-out``); perl-doc and debian-reference-en, by other authors, are held out whole. Another 50th of the
training documents is written down once more for calibration. Documents come in a fixed order and are never cut in two,
so that the same packages give the same bytes. Lines that a package repeats (feet of pages, WordNet's definitions under
each synonym) are kept once, or the held-out documents would hold what was trained on.

Packages are downloaded and unpacked beside the result, not installed (``--root``: where they are unpacked already).
The result holds all that training needs, so that it can travel to a machine that has no packages: ``corpus.json`` (what
it was made of), ``tokenizer/``, ``tokens/NAME.npy.xz`` (uint16) and ``texts/NAME.jsonl.xz``, which ``--data`` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.texts import PACKAGES, SHORTEST_DOCUMENT, SHORTEST_LINE, Package, extract, package_version

from nybble.core.files import atomic_write_bytes

MANUALS = {
    "python3.11-doc": PACKAGES["python3.11-doc"],
    "postgresql-doc-15": PACKAGES["postgresql-doc-15"],
    "linux-doc-6.1": Package(root=Path("/usr/share/doc/linux-doc-6.1/html"), pages="**/*.html"),
}
DICTIONARIES = {"dict-gcide": "gcide", "dict-wn": "wn", "dict-foldoc": "foldoc"}
HELD_OUT = {name: PACKAGES[name] for name in ("perl-doc", "debian-reference-en")}
VOCABULARY = 4096
END = "<|endoftext|>"  # between documents; id 0
EVERY = 50  # documents: one is held out, another calibrates too
DOCUMENT = 4000  # characters of dictionary entries that make a document

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_SOURCE_TAGS = re.compile(r"\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet[^\]]*|AS|RH|Century[^\]]*)(\s*\+PJC)?\]")
_PRONOUNCED = re.compile(r"\\[^\\\n]{1,80}\\,?")
_SENSE = re.compile(r"\s(?:(n|v|adj|adv)\s)?\d+: ")
_CROSS_REFERENCE = re.compile(r"\{([^{}]*)\}")


def unbase64(digits: str) -> int:
    """A number in a dictd index: digits of 6 bits, the most significant first (RFC 2229's reference server)."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def entry_prose(entry: str) -> str:
    """A dictionary's entry on one line: no pronunciation, no tags of where it was taken from, no reference braces."""
    plain = _SOURCE_TAGS.sub(" ", _PRONOUNCED.sub(", ", entry))
    plain = _CROSS_REFERENCE.sub(r"\1", plain)
    return re.sub(r"\s+([,.;])", r"\1", " ".join(plain.split()))


def dictionary(folder: Path, name: str) -> list[str]:
    """Entries of a dictd dictionary in the order of the file, as many to a document as make 4,000 characters."""
    places: set[tuple[int, int]] = set()
    for line in (folder / f"{name}.index").read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if not word.startswith(("00-database", "00database")):
            places.add((unbase64(start), unbase64(length)))
    packed = (folder / f"{name}.dict.dz").read_bytes()
    whole = zlib.decompress(packed, wbits=31)  # dictzip is gzip
    entries = (
        entry_prose(whole[start : start + length].decode("utf-8", "replace")) for start, length in sorted(places)
    )
    lines = senses(entries) if name == "wn" else entries
    return list(gathered(line for line in lines if len(line) >= SHORTEST_LINE))


def senses(entries: Iterable[str]) -> Iterator[str]:
    """WordNet's entries, one sense a line: what it lists again under each of a sense's synonyms comes once."""
    seen = set()
    for entry in entries:
        word, *parts = _SENSE.split(entry)
        kind = ""
        for given, meaning in zip(parts[::2], parts[1::2], strict=True):
            kind = given or kind
            if meaning not in seen:
                seen.add(meaning)
                yield f"{word} ({kind}): {meaning}"


def once(documents: list[str]) -> list[str]:
    """Documents without lines that an earlier one has, such as what every page of a manual says at its foot."""
    seen: set[str] = set()
    kept = []
    for text in documents:
        lines = [line for line in dict.fromkeys(text.split("\n")) if line not in seen]
        seen.update(lines)
        kept.append("\n".join(lines))
    return [text for text in kept if len(text) >= SHORTEST_DOCUMENT]


def gathered(lines: Iterable[str], characters: int = DOCUMENT) -> Iterator[str]:
    """Lines joined into documents of at least so many characters; the last may have fewer."""
    document: list[str] = []
    for line in lines:
        document.append(line)
        if sum(map(len, document)) >= characters:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def split(documents: list[str], every: int = EVERY) -> dict[str, list[str]]:
    """Whole documents to train on and to judge on; ``calibration`` is a part of what is trained on."""
    last, middle = every - 1, every // 2 - 1
    return {
        "train": [text for i, text in enumerate(documents) if i % every != last],
        "held-out": documents[last::every],
        "calibration": documents[middle::every],
    }


def corpus(root: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Documents by use, and how many documents and characters each package gave.

    Args:
        root: where the packages are unpacked.
    """
    uses: dict[str, list[str]] = {"train": [], "held-out": [], "calibration": []}
    counts: dict[str, dict[str, int]] = {}
    for name in (*MANUALS, *DICTIONARIES, *HELD_OUT):
        if name in DICTIONARIES:
            documents = dictionary(root / "usr/share/dictd", DICTIONARIES[name])
        else:
            package = (MANUALS | HELD_OUT)[name]
            documents = extract(root / package.root.relative_to("/"), package.pages)
            documents = list(dict.fromkeys(documents)) if name in HELD_OUT else once(documents)
        if name == "linux-doc-6.1":
            documents = [text for text in documents if is_english(text)]
        if not documents:
            raise SystemExit(f"no text of {name} under {root}")
        counts[name] = {"documents": len(documents), "characters": sum(map(len, documents))}
        for use, part in ({name: documents} if name in HELD_OUT else split(documents)).items():
            uses[use] = uses.get(use, []) + part
        print(f"{name}: {counts[name]['documents']:,} documents, {counts[name]['characters']:,} characters", flush=True)
    return uses, counts


def is_english(text: str) -> bool:
    """Whether a page isn't one of the kernel's translations: nearly all characters are ASCII."""
    return len(text.encode()) < 1.05 * len(text)


def train_tokenizer(documents: list[str], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE (``PreTrainedTokenizerFast``) whose token 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(documents, trainer)
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    return fast(tokenizer_object=made, bos_token=END, eos_token=END, pad_token=END)


def encode(tokenizer: Any, documents: list[str]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """All documents one after another, each behind the end-of-document token; uint16 [tokens]."""
    end = tokenizer.eos_token_id
    parts = []
    for i in range(0, len(documents), 1000):
        for encoded in tokenizer.backend_tokenizer.encode_batch(documents[i : i + 1000], add_special_tokens=False):
            parts.append(np.array([end, *encoded.ids], dtype=np.uint16))
    return np.concatenate(parts)


def write(folder: Path, uses: dict[str, list[str]], counts: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """Train the tokenizer, write all there is into the folder, and return what corpus.json says."""
    tokenizer = train_tokenizer(uses["train"])
    tokenizer.save_pretrained(folder / "tokenizer")
    record: dict[str, Any] = {"packages": {}, "vocabulary": len(tokenizer), "tokens": {}}
    for name, count in counts.items():
        record["packages"][name] = {"version": versions.get(name, "unknown"), **count}
    files: dict[Path, bytes] = {}
    for use, documents in uses.items():
        ids = encode(tokenizer, documents)
        record["tokens"][use] = {
            "tokens": len(ids),
            "characters": sum(map(len, documents)),
            "sha256": hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest(),
        }
        if use != "calibration":
            array = io.BytesIO()
            np.save(array, ids.astype("<u2"))
            files[folder / "tokens" / f"{use}.npy.xz"] = array.getvalue()
        if use != "train":
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
            files[folder / "texts" / f"{use}.jsonl.xz"] = lines.encode()
    with ThreadPoolExecutor() as pool:  # lzma lets go of the lock
        list(pool.map(_pack, files.items()))
    atomic_write_bytes(folder / "corpus.json", (json.dumps(record, indent=1) + "\n").encode())
    return record


def _pack(item: tuple[Path, bytes]) -> None:
    path, content = item
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ids are pairs of bytes: contexts that know which of the two comes next save some per cent.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}] if ".npy" in path.name else None
    atomic_write_bytes(path, lzma.compress(content, filters=filters))


def read_ids(folder: Path, use: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Token ids of a use (train, held-out, perl-doc, debian-reference-en), uint16 [tokens]."""
    with lzma.open(folder / "tokens" / f"{use}.npy.xz") as file:
        return np.asarray(np.load(io.BytesIO(file.read()), allow_pickle=False), dtype=np.uint16)


def fetch(folder: Path) -> dict[str, str]:
    """Download and unpack the packages into ``folder/root``; return their versions."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for name in (*MANUALS, *DICTIONARIES, *HELD_OUT):
        if not list(folder.glob(f"{name}_*.deb")):
            try:
                subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"can't download {name} ({error}): the text comes from packages of Debian 12; run this there and"
                    " copy the folder that it writes, or unpack the packages and give --root"
                ) from None
        (package,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg", "-x", package.name, "root"], cwd=folder, check=True)
        asked = subprocess.run(["dpkg-deb", "-f", package, "Version"], capture_output=True, text=True, check=True)
        versions[name] = asked.stdout.strip()
    return versions


def prepare(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """Make the folder, or read what it says if it is there already; return corpus.json's content."""
    done = folder / "corpus.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    packages = folder.with_name(f"{folder.name}-packages")  # beside it: the folder travels, they needn't
    if root is None:
        versions = fetch(packages)
    else:  # of packages unpacked by hand only the contents are known
        versions = {name: package_version(name) for name in (*MANUALS, *DICTIONARIES, *HELD_OUT) if root == Path("/")}
    uses, counts = corpus(root or packages / "root")
    return write(folder, uses, counts, versions)


def main() -> None:
    """Write the folder and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, help="where the packages are unpacked; / if they are installed")
    asked = parser.parse_args()
    json.dump(prepare(asked.folder, asked.root), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
