"""English text out of Debian's documentation packages, for calibration and for judging.

    apt-get install python3.11-doc debian-reference-en perl-doc postgresql-doc-15
    python benchmarks/texts.py python3.11-doc OUT.jsonl

OUT has one JSON object a line, ``{"text": ...}``, one line per page of the manual, in the order of the pages' paths:
what ``--data`` takes. Running text only: navigation, contents, indices, tables, code listings, signatures and lines of
under 40 characters are left out, and white space is evened out. The same package version gives the same bytes.

Calibrate on one package and judge on another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from nybble.core.files import atomic_write_bytes

SHORTEST_LINE = 40  # characters; headings, list stubs and buttons are shorter, sentences rarely
SHORTEST_DOCUMENT = 400  # characters; less is a page that had only lists and code


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where a Debian package keeps its pages, and which of them to read."""

    root: Path
    pages: str


PACKAGES = {
    "python3.11-doc": Package(root=Path("/usr/share/doc/python3.11/html"), pages="**/*.html"),
    "debian-reference-en": Package(root=Path("/usr/share/debian-reference"), pages="*.en.html"),
    "postgresql-doc-15": Package(root=Path("/usr/share/doc/postgresql-doc-15/html"), pages="*.html"),
    "perl-doc": Package(root=Path("/usr/share/perl/5.36.0/pod"), pages="*.pod"),
}

# Pages that list other pages.
_LISTS = re.compile(r"(genindex.*|.*modindex|search|index|contents|bookindex|changelog|download)(\.en)?\.html")

_SKIPPED_TAGS = {"script", "style", "head", "nav", "pre", "table", "form", "button", "svg", "math"}
_SKIPPED_CLASSES = {
    "related", "sphinxsidebar", "footer", "toctree-wrapper", "contents", "headerlink", "sig", "highlight",  # Sphinx
    "navheader", "navfooter", "toc", "id_link", "titlepage", "synopsis", "footnotes",  # DocBook
}  # fmt: skip
_BLOCKS = {
    "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "section", "body", "br", "hr",
    "blockquote", "aside", "article", "main", "header", "footer", "pre", "table",
}  # fmt: skip
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class _Prose(HTMLParser):
    """Collects running text, a line per block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self._line: list[str] = []
        self._open: list[tuple[str, bool]] = []  # elements around this point, and whether text here is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a line at a block; start skipping at what is no prose."""
        if tag in _BLOCKS:
            self.end_line()
        if tag in _VOID:
            return
        classes = set((dict(attrs).get("class") or "").split())
        skipped = tag in _SKIPPED_TAGS or bool(classes & _SKIPPED_CLASSES)
        self._open.append((tag, skipped or self._skipping))

    def handle_endtag(self, tag: str) -> None:
        """End a line at a block, and close elements whose end tags were left out (p, li)."""
        if tag in _BLOCKS:
            self.end_line()
        if tag in (name for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Treat ``<a id="x"/>`` as empty: XHTML pages have them."""
        if tag in _BLOCKS:
            self.end_line()

    def handle_data(self, data: str) -> None:
        """Keep text that is not skipped."""
        if not self._skipping:
            self._line.append(data)

    def end_line(self) -> None:
        """Close the line at hand, if it says anything."""
        line = " ".join("".join(self._line).split())
        self._line = []
        if len(line) >= SHORTEST_LINE:
            self.lines.append(line)

    @property
    def _skipping(self) -> bool:
        return bool(self._open) and self._open[-1][1]


def html_prose(page: str) -> list[str]:
    """Return the running text of an HTML page, a paragraph or list item per line."""
    parser = _Prose()
    parser.feed(page)
    parser.close()
    parser.end_line()
    return parser.lines


_POD_CODE = re.compile(r"[BCFILSXZ](?:<<+\s+(?P<wide>.*?)\s+>>+|<(?P<text>[^<>]*)>)", re.DOTALL)
_POD_ESCAPE = {"E<lt>": "<", "E<gt>": ">", "E<sol>": "/", "E<verbar>": "|"}


def pod_prose(page: str) -> list[str]:
    """Return the running text of a page in Perl's POD: its ordinary paragraphs, formatting codes resolved."""
    lines, skipping = [], False
    for paragraph in re.split(r"\n[ \t]*\n", page):
        if paragraph.startswith("="):
            skipping = paragraph.startswith("=begin") or (skipping and not paragraph.startswith(("=end", "=cut")))
        elif not skipping and not paragraph.startswith((" ", "\t")):  # indented: a listing
            line = " ".join(_resolve(paragraph).split())
            if len(line) >= SHORTEST_LINE:
                lines.append(line)
    return lines


def _resolve(paragraph: str) -> str:
    """Replace formatting codes by their text, the innermost first."""

    def text(code: re.Match[str]) -> str:
        inner = code["wide"] if code["wide"] is not None else code["text"]
        if code[0][0] in "XZ":  # index entries: not shown
            return ""
        return inner.split("|")[0].strip("/") if code[0][0] == "L" else inner

    before = None
    while before != paragraph:
        before, paragraph = paragraph, _POD_CODE.sub(text, paragraph)
    for escape, character in _POD_ESCAPE.items():
        paragraph = paragraph.replace(escape, character)
    return paragraph


def extract(package_root: Path, pages: str = "**/*.html") -> list[str]:
    """Return the documents under a folder: a string per page that holds prose, in the order of the pages' paths.

    Args:
        package_root: a folder of HTML pages, or of POD pages (``*.pod``).
        pages: a glob for them.
    """
    paths = sorted(package_root.glob(pages), key=lambda path: path.relative_to(package_root).as_posix())
    return [text for path in paths if len(text := "\n".join(_prose(path))) >= SHORTEST_DOCUMENT]


def _prose(path: Path) -> Iterator[str]:
    if _LISTS.fullmatch(path.name):
        return
    page = path.read_text(encoding="utf-8", errors="replace")
    yield from pod_prose(page) if path.suffix == ".pod" else html_prose(page)


def package_version(name: str) -> str:
    """The installed version of a Debian package."""
    asked = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", name], capture_output=True, text=True)
    return asked.stdout or "unknown"


def main() -> None:
    """Write one package's text and say on standard error what it is."""
    parser = argparse.ArgumentParser(description="Write the running text of a documentation package as JSONL.")
    parser.add_argument("name", choices=sorted(PACKAGES))
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    package = PACKAGES[asked.name]
    documents = extract(package.root, package.pages)
    if not documents:
        sys.exit(f"no text in {package.root}: run apt-get install {asked.name}")
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode()
    atomic_write_bytes(asked.out, content)
    characters = sum(map(len, documents))
    print(
        f"{asked.name} {package_version(asked.name)}: {len(documents)} documents, {characters:,} characters,"
        f" sha256 {hashlib.sha256(content).hexdigest()}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
