"""``nybble mac``: what a unit costs, as a table, as JSON and as Verilog."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nybble.cli import main
from nybble.formats import get_format
from nybble.hardware.mac import MacUnit
from nybble.hardware.verilog import verilog


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["nybble", "mac", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_one_object_and_the_unit_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "unit.v"
    assert run(monkeypatch, "e3m2", "int8", "--length", "100", "--verilog", str(file), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    unit = MacUnit(weights=get_format("e3m2"), inputs=get_format("int8"), length=100)
    assert file.read_text(encoding="utf-8") == verilog(unit)
    assert (found["weights"], found["inputs"], found["length"]) == ("float6_e3m2fn", "int8", 100)
    # 448 steps of 1/16 times 127, a hundred times: 5,689,600 < 2^23
    assert found["accumulator_bits"] == found["exact_bits"] == 24 and found["step"] == 1 / 16
    assert found["stated_bits"] == 9 + 7 + 7 + 1
    assert 30 < found["luts_estimated"] < 300


def test_the_inputs_are_as_the_weights_where_they_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "int4", "--accumulator", "stated") == 0
    printed = capsys.readouterr().out
    assert "mac_int4_int4" in printed and "accumulator bits │ 22" in printed and "exact bits       │ 19" in printed
    assert run(monkeypatch, "nf4") == 0
    assert "stated bits      │ -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["e2m9x"], "unknown number format 'e2m9x'"),
        (["int4", "float8_e8m0fnu"], "float8_e8m0fnu: a unit would need"),
        (["int4", "--length", "0"], "length=0: a dot product has at least one term"),
        (["int4", "--accumulator", "wide"], "accumulator='wide' is neither 'exact' nor 'stated'"),
        (["nf4", "--accumulator", "stated"], "the paper states widths of integers and eXmY floats"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


@pytest.mark.skipif(shutil.which("yosys") is None, reason="yosys: apt-get install yosys")
def test_mapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "int2", "--length", "4", "--synthesize", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    # one bit of magnitude each: a sum of four is 4 bits wide, and the least that an adder takes is a LUT a bit
    assert found["flops"] == found["accumulator_bits"] == 4 and 4 <= found["luts"] <= 12


def test_yosys_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(monkeypatch, "int2", "--synthesize") == 2
    assert "yosys isn't on the path" in capsys.readouterr().err
