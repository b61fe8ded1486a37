"""Generated Verilog, played by Icarus Verilog and mapped by Yosys, against what the formats' values say.

apt-get install iverilog yosys
"""

from __future__ import annotations

import json
import random
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from nybble.core.errors import DataError, UsageError
from nybble.formats import get_format
from nybble.hardware.mac import MacUnit
from nybble.hardware.tools import Term, bench, simulate, synthesize, toggles
from nybble.hardware.verilog import verilog

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "mac.json"
needs_iverilog = pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog: apt-get install iverilog")
needs_yosys = pytest.mark.skipif(shutil.which("yosys") is None, reason="yosys: apt-get install yosys")
SMALL = (
    ("e2m1", "e2m1"), ("int4", "int4"), ("e3m2", "int4"), ("int3", "e1m2_finite"), ("e3m0_finite", "uint4"),
    ("int4_full", "int4_full"), ("ufloat4_e2m2_finite", "e2m0_finite"), ("nf4", "ternary"), ("binary", "e4m0_finite"),
    ("dybit4", "e1m1_finite"), ("float4_e2m1", "float4_e2m1"), ("e2m1b-3_finite", "float4_e2m1fnuz"),
)  # fmt: skip
LARGE = (
    ("float8_e4m3fn", "float8_e4m3fn"), ("float8_e5m2", "int8"), ("int8", "int8"), ("e4m3_finite", "e2m1"),
    ("float8_e4m3fnuz", "float6_e3m2fn"), ("e5m2_finite", "e5m2_finite"), ("int8_full", "uint8"), ("e6m1", "int2"),
)  # fmt: skip


def unit(pair: tuple[str, str], length: int = 4608) -> MacUnit:
    return MacUnit(weights=get_format(pair[0]), inputs=get_format(pair[1]), length=length)


def expected(found: MacUnit, terms: list[Term]) -> list[tuple[int, bool]]:
    """From the formats' values alone, in exact fractions."""
    total, invalid, sums = Fraction(0), False, []
    w, x = ([float(v) for v in fmt.values] for fmt in (found.weights, found.inputs))
    for reset, a, b in terms:
        if reset:
            total, invalid = Fraction(0), False
        elif abs(w[a]) < float("inf") and abs(x[b]) < float("inf"):
            total += Fraction(w[a]) * Fraction(x[b])
        else:
            invalid = True
        step = total / Fraction(2) ** found.lsb
        assert step.denominator == 1
        sums.append((int(step), invalid))
    return sums


def produced(fmt_name: str) -> list[int]:
    """Codes of numbers that an encoder produces, and those that are no number."""
    fmt = get_format(fmt_name)
    finite = fmt.encodable()
    return [
        c for c in range(1 << fmt.bits) if finite[c] or abs(float(fmt.values[c])) == float("inf") or c in nans(fmt_name)
    ]


def nans(fmt_name: str) -> set[int]:
    return {c for c, v in enumerate(get_format(fmt_name).values) if v != v}


@needs_iverilog
@pytest.mark.parametrize("pair", SMALL, ids=" x ".join)
def test_every_pair_of_codes_alone_and_in_a_row(pair: tuple[str, str]) -> None:
    found, draw = unit(pair), random.Random(1)
    pairs = [(a, b) for a in produced(pair[0]) for b in produced(pair[1])]
    terms: list[Term] = [term for a, b in pairs for term in ((True, a, b), (False, a, b))]
    draw.shuffle(pairs)
    terms += [(True, 0, 0), *((False, a, b) for a, b in pairs)]
    wanted = expected(found, terms)
    assert simulate(found, terms) == wanted
    assert len({total for total, _ in wanted}) > 3


@needs_iverilog
@pytest.mark.parametrize("pair", LARGE, ids=" x ".join)
def test_random_codes_in_a_row(pair: tuple[str, str]) -> None:
    """The same largest product at the end as often as the sum holds it."""
    found, draw = unit(pair, length=600), random.Random(2)
    w, x = produced(pair[0]), produced(pair[1])
    terms: list[Term] = [(True, 0, 0)] + [(False, draw.choice(w), draw.choice(x)) for _ in range(500)]
    a, b = (int(fmt.grid_codes[0 if fmt.signed else -1]) for fmt in (found.weights, found.inputs))
    terms += [(True, 0, 0), *[(False, a, b)] * 600, (True, 1, 1)]
    assert simulate(found, terms) == expected(found, terms)


@needs_iverilog
def test_a_sum_is_as_nybble_wraps_it() -> None:
    found = MacUnit(weights=get_format("int3"), inputs=get_format("int3"), length=1)
    codes = [3] * 9
    terms: list[Term] = [(True, 0, 0), *((False, c, c) for c in codes)]
    assert simulate(found, terms)[1:] == found.sums(codes, codes)
    assert min(found.sums(codes, codes))[0] < 0


@needs_iverilog
@needs_yosys
def test_what_it_is_mapped_to_computes_the_same() -> None:
    """And takes what the committed table says, within what another version of Yosys may do."""
    found, draw = unit(("e2m1", "e2m1")), random.Random(3)
    mapped = synthesize(found)
    terms: list[Term] = [(True, 0, 0)] + [(False, draw.randrange(16), draw.randrange(16)) for _ in range(200)]
    assert simulate(found, terms, mapped.netlist) == expected(found, terms)
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["units"]
    (row,) = (r for r in rows if (r["weights"], r["inputs"]) == ("float4_e2m1fn", "float4_e2m1fn"))
    assert mapped.luts == pytest.approx(row["luts"], rel=0.2) and mapped.flops == row["flops"] == found.bits
    busy, idle = toggles(found, terms, mapped.netlist), toggles(found, [(True, 0, 0)] * 20, mapped.netlist)
    assert 10 < busy < 400 and idle == 0


def test_the_text_names_what_it_computes() -> None:
    text = verilog(unit(("e2m1", "int4")))
    assert "module mac_float4_e2m1fn_int4 (" in text and "steps of 2^-1 " in text and "up to 4608 terms" in text
    assert "invalid" not in text and "invalid" in verilog(unit(("float8_e4m3fn", "int4")))
    assert max(len(line) for line in text.splitlines()) < 100


def test_tools_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="iverilog isn't on the path; it comes with `apt-get install iverilog`"):
        simulate(unit(("int4", "int4")), [(True, 0, 0)])
    with pytest.raises(UsageError, match="yosys isn't on the path"):
        synthesize(unit(("int4", "int4")))


@needs_iverilog
def test_a_sum_that_was_never_reset_is_unknown() -> None:
    with pytest.raises(DataError, match="reset first"):
        simulate(unit(("int4", "int4")), [(False, 1, 1)])
    assert "$fscanf" in bench(unit(("int4", "int4")))


@needs_iverilog
def test_text_that_is_no_verilog_is_an_error() -> None:
    with pytest.raises(DataError, match="iverilog failed"):
        simulate(unit(("int4", "int4")), [(True, 0, 0)], "module mac_int4_int4(; endmodule")
