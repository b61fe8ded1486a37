"""Where the study's texts and images come from: Debian 12's package index, LibreOffice's translations, Fashion-MNIST.

The package index's long descriptions are in a list that small installations leave out, so that it is fetched into a
folder of its own; nothing is installed.
"""

from __future__ import annotations

import gettext
import gzip
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LANGUAGES = ("de", "es", "fr", "ro")
TRANSLATIONS = "libreoffice-l10n-{}"
_MARKS = re.compile(r"~|\s*\(?[~_]\w\)$")  # of keyboard shortcuts


@dataclass(frozen=True, kw_only=True)
class Described:
    """A Debian package as its index has it; ``source`` is what it was built from."""

    name: str
    source: str
    section: str
    summary: str
    description: str


def descriptions(folder: Path) -> list[Described]:
    """Every package of the index with a long description, by name."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::Lists={lists.resolve()}"]
    if not list(lists.glob("*Translation-en*")):
        _apt(["apt-get", "update", "-qq", *options, "-o", "Acquire::Languages=en"], "the package index of Debian 12")
    long: dict[str, str] = {}
    for path in sorted(lists.glob("*Translation-en*")):
        text = _apt(["/usr/lib/apt/apt-helper", "cat-file", str(path.resolve())], str(path))
        for fields in stanzas(text):
            long.setdefault(fields["Description-md5"], fields["Description-en"])
    found = {}
    for fields in stanzas(_apt(["apt-cache", *options, "dumpavail"], "the package index")):
        whole = long.get(fields.get("Description-md5", ""))
        if whole is None or "Section" not in fields:
            continue
        summary, description = prose(whole)
        if description:
            name, source = fields["Package"], fields.get("Source", fields["Package"]).split()[0]
            section = fields["Section"].rsplit("/", 1)[-1]
            found[name] = Described(name=name, source=source, section=section, summary=summary, description=description)
    return [found[name] for name in sorted(found)]


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The records of a Debian control file; lines that go on keep their line breaks."""
    for record in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in record.splitlines():
            if line[:1] in " \t":
                fields[key] += "\n" + line
            elif ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


def prose(text: str) -> tuple[str, str]:
    """Summary and description of a Description field: paragraphs on a line each (Debian policy 5.6.13)."""
    summary, _, rest = text.partition("\n")
    lines = [line.strip() for line in rest.split("\n")]
    paragraphs = " ".join("\n" if line == "." else line for line in lines).split("\n")
    return summary.strip(), "\n".join(" ".join(part.split()) for part in paragraphs).strip()


def translations(folder: Path, languages: Sequence[str] = LANGUAGES) -> dict[str, list[tuple[str, str]]]:
    """Unique pairs of English and another language, of at least two words, in the order of the English."""
    found = {}
    for language in languages:
        root, package = folder / "root", TRANSLATIONS.format(language)
        place = root / "usr/lib/libreoffice/program/resource" / language / "LC_MESSAGES"
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _apt(["apt-get", "download", "-qq", package], package, cwd=folder)
            (archive,) = folder.glob(f"{package}_*.deb")
            _apt(["dpkg", "-x", archive.name, "root"], package, cwd=folder)
        pairs = set()
        for path in sorted(place.glob("*.mo")):
            with path.open("rb") as file:
                catalogue: Any = gettext.GNUTranslations(file)
            for key, there in catalogue._catalog.items():
                if isinstance(key, str) and key and isinstance(there, str):
                    pair = plain(key.rpartition("\x04")[2]), plain(there)
                    if len(pair[0].split()) > 1 and pair[0] != pair[1] and all(pair):
                        pairs.add(pair)
        found[language] = sorted(pairs)
    return found


def plain(text: str) -> str:
    """A string of a user interface without marks of shortcuts, on one line."""
    return " ".join(_MARKS.sub("", text).split())


def images(folder: Path, part: str) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Fashion-MNIST's images, uint8 [n, 28, 28], and labels, uint8 [n], of ``train`` or ``t10k``."""
    read = []
    for name, offset in ((f"{part}-images-idx3-ubyte", 16), (f"{part}-labels-idx1-ubyte", 8)):
        found = sorted(folder.rglob(f"{name}*"))
        if not found:
            raise SystemExit(f"{folder} holds no {name}: apt-get install dataset-fashion-mnist, or name its folder")
        content = found[0].read_bytes()
        content = gzip.decompress(content) if found[0].suffix == ".gz" else content
        read.append(np.frombuffer(content, np.uint8, offset=offset))
    return read[0].reshape(-1, 28, 28), read[1]


def _apt(command: list[str], what: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no {what}: {error}. Run --pack on Debian 12 and take its file to other machines.") from None
