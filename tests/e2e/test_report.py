"""``nybble report`` on a real folder: the command, what it refuses, and the page in a browser."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.browser import Page, browse, find_chromium
from tests.parts.report.synthetic import EVIL, manifest, page_data, save_quantized
from tests.parts.report.test_training import CLASSES
from tests.tiny import save_text, tiny_model, tiny_tokenizer

from nybble import quantize, save
from nybble.cli import main
from nybble.pipelines.report import collect, write_report
from nybble.report.page import render
from nybble.report.training import render_training
from nybble.training.convert import convert
from nybble.training.prepare import prepare

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def nybble(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["nybble", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"prompt": EVIL, "float": "a", "quantized": EVIL}]
    return save_quantized(tmp_path_factory.mktemp("report"), samples=samples)


@pytest.fixture
def folder(quantized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(quantized, tmp_path / "tiny <b>model")


def test_command_writes_the_page(folder: Path, nybble: Run) -> None:
    code, output, _ = nybble("report", folder, "--json")
    found = json.loads(output)
    page = (folder / "report.html").read_text()
    assert (code, found["report"], found["bytes"]) == (0, str(folder / "report.html"), len(page.encode()))
    assert (found["layers"], found["evaluated"]) == (14, True)
    assert "<h1>model</h1>" in page and "in tiny &lt;b&gt;model · LlamaForCausalLM" in page
    assert "<script>alert" not in page
    nybble("report", folder)
    assert (folder / "report.html").read_text() == page  # it does not count itself
    nybble("inspect", folder)


def test_out_and_no_evaluation(folder: Path, tmp_path: Path, nybble: Run) -> None:
    (folder / "evaluation.json").unlink()
    code, output, _ = nybble("report", folder, "--out", tmp_path / "a.html")
    assert code == 0
    assert "a.html: " in output and "--eval SRC" in output
    assert not (folder / "report.html").exists()


def test_a_folder_saved_from_memory(tmp_path: Path, nybble: Run) -> None:
    """The model remembers how it was made, also through a copy: the same rows as the report of the run."""
    text = save_text(tmp_path / "text.txt")
    made, report = quantize(
        tiny_model(), "gptq", text, tokenizer=tiny_tokenizer(), settings={"samples": 4, "seq_len": 16},
        weights="int4 group=16", activations="float8_e4m3fn token",
    )  # fmt: skip
    out = save(copy.deepcopy(made), tmp_path / "out", tiny_tokenizer())
    written = json.loads((out / "nybble.json").read_text())
    assert written.pop("form")["name"] == "compressed-tensors"
    assert written == json.loads(json.dumps(report.manifest | {"layers": [row.to_dict() for row in report.layers]}))
    assert written["recipe"]["name"] == "gptq" and "with the recipe `gptq`" in (out / "README.md").read_text()
    code, output, _ = nybble("report", out, "--json")
    assert code == 0 and json.loads(output)["layers"] == len(report.layers) == 14
    assert nybble("eval", out, "--data", text, "--seq-len", "16")[0] == 0
    assert nybble("generate", out, "abc", "--max-new-tokens", "2")[0] == 0
    assert nybble("inspect", out)[0] == 0


@pytest.mark.parametrize("how", ["converted", "transformers"])
def test_a_folder_without_the_record_of_a_run(how: str, tmp_path: Path, nybble: Run) -> None:
    """What its weights say, and that more isn't known; what needs a tokenizer names the way to one."""
    out = tmp_path / "out"
    if how == "converted":
        trained: Any = convert(prepare(tiny_model(), {"weights": "int4 group=16", "inputs": "int8 token"}))
        save(trained, out)
    else:
        quantize(tiny_model(), weights="int4 group=16", activations="int8 token")[0].save_pretrained(out)
        assert not (out / "nybble.json").exists()
    rows = collect(out)["manifest"]["layers"]
    assert len(rows) == 14 and rows[0]["name"] == "model.layers.0.self_attn.q_proj"
    wanted = {"shape": [32, 32], "weights": "int4 group=16", "inputs": "int8 token", "bits": 5.0, "error": None}
    assert {key: rows[0][key] for key in wanted} == wanted
    code, _, err = nybble("report", out)
    assert code == 0, err
    assert "no record of a run" in (out / "report.html").read_text()
    assert nybble("inspect", out)[0] == 0
    for arguments in (("eval", out), ("generate", out, "abc")):
        code, _, err = nybble(*arguments)
        assert code == 1 and err.endswith(
            f"nybble: {out} holds no tokenizer. Put one beside the weights (tokenizer.save_pretrained(folder)); in "
            "Python, data as token ids or samples needs none.\n"
        )


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "not JSON": (lambda f: (f / "nybble.json").write_text("{"), "nybble.json can't be read"),
    "no object": (lambda f: (f / "nybble.json").write_text("[]"), "nybble.json holds a JSON list"),
    "deep": (lambda f: (f / "nybble.json").write_text("[" * 10**5), "nybble.json can't be read"),
    "no layers": (lambda f: _change(f, "nybble.json", layers=[]), "nybble.json: it lists no layers"),
    "bad layer": (lambda f: _change(f, "nybble.json", layers=[{"name": "q"}]), "layer 'q' has no 'shape'"),
    "evaluation": (lambda f: _change(f, "evaluation.json", models=5), "evaluation.json: 'models'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "weights": (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "model.safetensors"),
}


def _change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder(what: str, folder: Path, nybble: Run) -> None:
    change, message = BROKEN[what]
    change(folder)
    code, output, errors = nybble("report", folder)
    assert (code, output) == (1, "")
    assert message in errors and "Traceback" not in errors and errors.count("\n") == 1
    assert not list(folder.glob("report*"))


@pytest.mark.parametrize("out", ["nybble.json", "page.txt", "page"])
def test_out_must_be_a_page(out: str, folder: Path, nybble: Run) -> None:
    code, _, errors = nybble("report", folder, "--out", folder / out)
    assert code == 2 and "ends in .html" in errors


def test_out_that_cannot_be_written(folder: Path, tmp_path: Path, nybble: Run) -> None:
    (tmp_path / "a.html").mkdir()
    assert "is a folder" in nybble("report", folder, "--out", tmp_path / "a.html")[2]
    code, _, errors = nybble("report", folder, "--out", tmp_path / "none" / "b.html")
    assert code == 1 and "b.html: No such file or directory" in errors


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: install Debian's chromium to test the page in a browser")
    with browse(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = page_data(30)
    data["manifest"]["layers"][5]["name"] = EVIL
    made = tmp_path_factory.mktemp("pages") / "large.html"
    made.write_text(render(data))
    return made


def check_quiet(page: Page, url: str) -> None:
    """Nothing was logged, thrown or fetched but the page itself."""
    noisy = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
    assert [event for event in page.events if event["method"] in noisy] == []
    fetched = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert [found for found in fetched if not found.startswith("data:")] == [url]


def column(page: Page, key: str) -> list[str]:
    """The texts of a column from top to bottom."""
    script = """(() => { const table = document.getElementById("layers");
        const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.dataset.key === KEY);
        return [...table.tBodies[0].rows].filter(row => !row.hidden && row.className !== "detail")
            .map(row => row.cells[at].textContent); })()"""
    found: list[str] = page.run(script.replace("KEY", json.dumps(key)))
    return found


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_page_in_a_browser(width: int, height: int, page: Page, large: Path) -> None:
    page.events.clear()
    page.open(large.as_uri(), width, height)
    assert page.run("document.documentElement.scrollWidth") <= width  # only the tables scroll sideways
    assert page.run("document.querySelectorAll('[data-chart] > svg').length") == 3
    assert page.run("[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label'))")
    assert page.run("document.querySelector('[data-chart=error]').querySelectorAll('.mark').length") == 420

    cut = """[...document.querySelectorAll('.scroll')].map(area => [
        area.scrollWidth > area.clientWidth + 1, !area.previousElementSibling.hidden,
        area.previousElementSibling.className])"""
    hints = page.run(cut)
    assert all(is_cut == is_said and name == "swipe" for is_cut, is_said, name in hints)
    assert [is_cut for is_cut, *_ in hints] == ([False, True, True] if width == 390 else [False, False, True])
    assert "float4_e2m1fn shifted static" in column(page, "inputs")

    for wanted, down in (("descending", True), ("ascending", False)):
        page.run("document.querySelector('th[data-key=sqnr] button').click()")
        assert page.run("document.querySelector('th[data-key=sqnr]').getAttribute('aria-sort')") == wanted
        values = [float(text) for text in column(page, "sqnr")]
        assert values == sorted(values, reverse=down) and len(values) == 210
    page.run("document.querySelector('th[data-key=name] button').click()")
    assert page.run("document.querySelector('th[data-key=sqnr]').getAttribute('aria-sort')") == "none"
    names = [name for name in column(page, "name") if name != EVIL]
    assert names.index("model.layers.2.mlp.up_proj") < names.index("model.layers.10.mlp.up_proj")  # 2 before 10

    page.run("document.querySelector('#layers tbody button').click()")
    page.settle()
    assert page.run("document.querySelector('#layers tbody button').getAttribute('aria-expanded')") == "true"
    assert page.run("document.querySelectorAll('.detail svg').length") == 5
    assert page.run("document.querySelector('.inside').getBoundingClientRect().width") <= width
    assert page.run("document.querySelectorAll('.detail svg')[0].querySelectorAll('.through').length") >= 13
    page.run("document.querySelector('#layers tbody button').click()")
    assert page.run("document.querySelectorAll('.detail').length") == 0

    page.run("const field = document.getElementById('filter'); field.value = 'DOWN_PROJ';"
             "field.dispatchEvent(new Event('input'))")  # fmt: skip
    assert column(page, "name").count(EVIL) == 0 and len(column(page, "name")) == 30
    assert page.run("document.getElementById('count').textContent") == "30 of 210 layers"

    page.run("document.querySelector('[data-chart=spread] .mark').dispatchEvent(new MouseEvent('click'))")
    assert page.run("document.activeElement === document.querySelector('#layers button[aria-expanded=true]')")

    page.run("document.querySelector('.legend button').click()")
    assert page.run("document.querySelectorAll('.legend button[aria-pressed=true]').length") == 2  # in both legends
    assert page.run("document.querySelector('[data-chart=error]').querySelectorAll('.mark').length") == 60
    check_quiet(page, large.as_uri())


def test_real_page_in_a_browser(page: Page, folder: Path) -> None:
    write_report(folder)
    url = (folder / "report.html").as_uri()
    page.events.clear()
    page.open(url, 390, 844, dark=True)
    page.run("document.querySelectorAll('#layers tbody th button').forEach(button => button.click())")
    page.settle()
    assert page.run("document.querySelectorAll('.detail').length") == 14
    assert page.run("document.querySelectorAll('.detail svg').length") >= 14
    assert page.run("document.querySelector('.prompt').textContent").strip().endswith(EVIL)
    check_quiet(page, url)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_trainings_page_in_a_browser(width: int, page: Page, tmp_path: Path) -> None:
    """Metrics stand under their headings, histograms and curves have their size, and nothing but tables is wide."""
    rows = manifest(1)["layers"]
    rows[0]["weight_picture"]["thresholds"] = [[-0.5, -0.25], [0.25, 0.25]]
    made = tmp_path / "training.html"
    made.write_text(render_training(CLASSES, rows, "layers.html"))
    page.events.clear()
    page.open(made.as_uri(), width, 900)
    assert page.run("document.documentElement.scrollWidth") <= width
    edges = """[...document.querySelectorAll('.metrics tr')].map(row => [...row.cells].slice(1)
        .map(cell => Math.round(cell.getBoundingClientRect().right)))"""
    heading, *values = page.run(edges)
    assert len(heading) == 4 and heading == sorted({*heading}) and values and all(found == heading for found in values)
    sizes = "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().width, s.ariaLabel !== ''])"
    found = page.run(sizes)
    assert len(found) == 3 + len(rows) and all(wide > 100 and said for wide, said in found)
    check_quiet(page, made.as_uri())
