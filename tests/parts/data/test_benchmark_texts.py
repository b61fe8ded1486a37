"""benchmarks/texts.py: manual pages to running text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import texts

from nybble.data import load_text

SENTENCE = "This sentence is long enough to be kept by the rule."

PAGE = f"""<!DOCTYPE html><html><head><title>{SENTENCE} (title)</title></head><body>
<div class="related"><ul><li>{SENTENCE} (navigation)</ul></div>
<h1>Short heading</h1><a id="anchor"/>
<p>This   sentence is <em>long</em> enough to be<br>
kept &amp; it goes on after the break for long enough.
<ul><li>{SENTENCE} (first item)<li>{SENTENCE} (second item)</ul>
<pre>{SENTENCE} (listing)</pre>
<dl><dt class="sig sig-object">{SENTENCE} (signature)</dt><dd><p>{SENTENCE} (meaning)</p></dd></dl>
<table><tr><td>{SENTENCE} (table)</td></tr></table>
<p>Too short.</p>{SENTENCE} (at the end)
</body></html>"""

POD = f"""=head1 A heading that is long enough to be kept but is none

{SENTENCE} C<code> and L<text|perlfunc/name> and L<perlre> and
B<< C<< $a->b >> >>X<index> E<lt>tag.

    {SENTENCE} indented, so a listing

=begin html

{SENTENCE} for another formatter

=end html

=cut
"""


def test_html_to_running_text() -> None:
    assert texts.html_prose(PAGE) == [
        "kept & it goes on after the break for long enough.",
        f"{SENTENCE} (first item)",
        f"{SENTENCE} (second item)",
        f"{SENTENCE} (meaning)",
        f"{SENTENCE} (at the end)",
    ]


def test_pod_to_running_text() -> None:
    assert texts.pod_prose(POD) == [f"{SENTENCE} code and text and perlre and $a->b <tag."]


def test_documents_come_in_the_order_of_their_paths_without_lists_of_pages(tmp_path: Path) -> None:
    for name, word in [("b.html", "two"), ("a/z.html", "one"), ("genindex-A.html", "no"), ("c.html", "three")]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<p>{word} {SENTENCE}</p>" * (10 if word != "three" else 1), encoding="utf-8")
    found = texts.extract(tmp_path)
    assert [document.split(maxsplit=1)[0] for document in found] == ["one", "two"]  # c.html is too short


def test_what_it_writes_is_what_load_text_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text(f"<p>{SENTENCE} é\u2028</p>" * 10, encoding="utf-8")
    monkeypatch.setitem(texts.PACKAGES, "perl-doc", texts.Package(root=tmp_path, pages="*.html"))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["texts.py", "perl-doc", str(out)])
    texts.main()
    assert load_text(str(out), "evaluation").documents == tuple(texts.extract(tmp_path))
    assert list(json.loads(out.read_text(encoding="utf-8"))) == ["text"]


def test_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts.PACKAGES, "perl-doc", texts.Package(root=tmp_path / "no", pages="*.html"))
    monkeypatch.setattr(sys, "argv", ["texts.py", "perl-doc", str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit, match="apt-get install perl-doc"):
        texts.main()
    assert not list(tmp_path.iterdir())


def test_command_names_the_packages_it_knows() -> None:
    shown = subprocess.run([sys.executable, texts.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "debian-reference-en" in shown.stdout
