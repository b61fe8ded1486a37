"""Units in other people's tools: Icarus Verilog plays codes through them, Yosys maps them to an FPGA's cells.

Both are programs (Debian: ``apt-get install iverilog yosys``) that are looked for on the path and run in a temporary
folder. Yosys counts what its own mapping gives, before placement: a vendor's tool packs two small LUTs into one and
may count fewer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nybble.core.errors import DataError, UsageError
from nybble.hardware.mac import MacUnit
from nybble.hardware.verilog import verilog

Term = tuple[bool, int, int]
"""One clock of a unit: whether the sum is cleared (the codes are then not added), a weight's code, an input's code."""
SECONDS = 600
FLOW = "synth_xilinx -family xcup -flatten -nodsp -nowidelut -noiopad -noclkbuf"
"""UltraScale+: six-input LUTs, carry chains, flip-flops with reset and enable; no multiplier blocks."""
WRITE = "splitnets; opt_clean -purge; write_verilog -noattr netlist.v"
"""Each bit a net of its own, so that a dump shows each once."""
CELLS = "xilinx/cells_sim.v"
_SEEN = re.compile(r"^\s+(\w+)\s+(\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """What a unit became.

    Attributes:
        luts: look-up tables of up to six inputs. carries: carry blocks of four bits. flops: flip-flops.
        cells: how many of each primitive.
        netlist: the mapped unit in Verilog, of the vendor's cells.
    """

    luts: int
    carries: int
    flops: int
    cells: dict[str, int] = field(compare=False)
    netlist: str = field(compare=False, repr=False)


def find_tool(name: str) -> str:
    """Where a program is.

    Raises:
        UsageError: it isn't installed.
    """
    found = shutil.which(name)
    if found is None:
        package = "iverilog" if name in ("iverilog", "vvp") else name
        raise UsageError(f"{name} isn't on the path; it comes with `apt-get install {package}`.")
    return found


def version_of(name: str) -> str:
    """The first line of what a program says of itself."""
    said = subprocess.run([find_tool(name), "-V"], capture_output=True, text=True, check=False, timeout=SECONDS)
    return said.stdout.splitlines()[0].strip()


def bench(unit: MacUnit) -> str:
    """A test bench: reads ``reset w x`` in bits from the file ``+vectors=``, prints sum and flag after each clock."""
    special = any(operand.special_codes for operand in unit.operands)
    return f"""module bench;
  reg clock, reset;
  reg [{unit.weights.bits - 1}:0] w;
  reg [{unit.inputs.bits - 1}:0] x;
  wire [{unit.bits - 1}:0] sum;
  wire invalid;
  integer file, got;
  reg [8 * 1024 - 1:0] name;
  {unit.name} unit (.clock(clock), .reset(reset), .enable(1'b1), .w(w), .x(x), .sum(sum)\
{", .invalid(invalid)" if special else ""});
  {"" if special else "assign invalid = 0;"}
  initial begin
    if (!$value$plusargs("vectors=%s", name)) $finish;
    file = $fopen(name, "r");
    if ($test$plusargs("dump")) begin $dumpfile("bench.vcd"); $dumpvars(1, unit); end
    clock = 0;
    got = $fscanf(file, "%b %b %b\\n", reset, w, x);
    while (got == 3) begin
      #5 clock = 1;
      #5 $display("%b %b", invalid, sum);
      clock = 0;
      got = $fscanf(file, "%b %b %b\\n", reset, w, x);
    end
    $finish;
  end
endmodule
"""


def simulate(unit: MacUnit, terms: Sequence[Term], netlist: str | None = None) -> list[tuple[int, bool]]:
    """Play codes through a unit.

    Args:
        unit: whose Verilog is generated.
        terms: clock by clock; the first has to reset.
        netlist: what :func:`synthesize` made of it, to be played instead.

    Returns:
        After each clock the sum in steps, and the unit's ``invalid``; as :meth:`~nybble.hardware.mac.MacUnit.sums`.

    Raises:
        UsageError: Icarus Verilog isn't installed. DataError: it failed, or a sum is unknown (X).
    """
    with tempfile.TemporaryDirectory(prefix="nybble-") as name:
        return _played(unit, terms, netlist, Path(name), dump=False)


def toggles(unit: MacUnit, terms: Sequence[Term], netlist: str) -> float:
    """Changes of a mapped unit's nets per clock: a stand-in for its switching energy, without delays or glitches.

    Args:
        unit: what was mapped.
        terms: as for :func:`simulate`.
        netlist: what :func:`synthesize` made of it.

    Returns:
        Bits that change value per term, over all nets of the netlist but the clock.
    """
    with tempfile.TemporaryDirectory(prefix="nybble-") as name:
        _played(unit, terms, netlist, Path(name), dump=True)
        return _changes(Path(name) / "bench.vcd") / len(terms)


def synthesize(unit: MacUnit) -> Mapped:
    """Map a unit to LUTs, carry chains and flip-flops with Yosys (:data:`FLOW`).

    Raises:
        UsageError: Yosys isn't installed. DataError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="nybble-") as name:
        folder = Path(name)
        (folder / "unit.v").write_text(verilog(unit), encoding="utf-8")
        script = f"read_verilog unit.v; {FLOW} -top {unit.name}; tee -o cells.txt stat; {WRITE}"
        _run([find_tool("yosys"), "-q", "-p", script], folder)
        cells = {kind: int(count) for kind, count in _SEEN.findall((folder / "cells.txt").read_text("utf-8"))}
        netlist = (folder / "netlist.v").read_text(encoding="utf-8")
    return Mapped(
        luts=_count(cells, "LUT"),
        carries=_count(cells, "CARRY"),
        flops=_count(cells, "FD"),
        cells=cells,
        netlist=netlist,
    )


def _count(cells: dict[str, int], kind: str) -> int:
    return sum(count for name, count in cells.items() if name.startswith(kind))


def _played(
    unit: MacUnit, terms: Sequence[Term], netlist: str | None, folder: Path, dump: bool
) -> list[tuple[int, bool]]:
    """Write, compile, run, read."""
    (folder / "unit.v").write_text(verilog(unit) if netlist is None else netlist, encoding="utf-8")
    (folder / "bench.v").write_text(bench(unit), encoding="utf-8")
    a, b = unit.weights.bits, unit.inputs.bits
    rows = (f"{int(reset)} {w:0{a}b} {x:0{b}b}\n" for reset, w, x in terms)
    (folder / "vectors.txt").write_text("".join(rows), encoding="utf-8")
    files = ["bench.v", "unit.v"] if netlist is None else ["bench.v", "unit.v", str(_cells())]
    _run([find_tool("iverilog"), "-g2005-sv", "-s", "bench", "-o", "bench.vvp", *files], folder)
    said = _run([find_tool("vvp"), "-n", "bench.vvp", "+vectors=vectors.txt", *(["+dump"] if dump else [])], folder)
    found = [line.split() for line in said.splitlines() if re.fullmatch(r"[01xz] [01xz]+", line)]
    if len(found) != len(terms) or any(set(flag + bits) - {"0", "1"} for flag, bits in found):
        raise DataError(f"{unit.name}: {len(terms)} terms gave {len(found)} sums, some perhaps unknown; reset first.")
    return [(_signed(bits), flag == "1") for flag, bits in found]


def _cells() -> Path:
    """Yosys's models of the vendor's cells."""
    return Path(find_tool("yosys")).resolve().parents[1] / "share" / "yosys" / CELLS


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise DataError(f"{Path(command[0]).name} failed: {' / '.join(last)}")
    return done.stdout


def _signed(bits: str) -> int:
    value = int(bits, 2)
    return value - (1 << len(bits)) if bits[0] == "1" else value


def _changes(vcd: Path) -> int:
    """Bits that change in a dump, from the second clock on; a net that has several names counts once, the clock not."""
    widths: dict[str, int] = {}
    values: dict[str, str] = {}
    clocks: set[str] = set()
    changed, started = 0, False
    for line in vcd.read_text(encoding="utf-8").splitlines():
        if line.startswith("$var"):
            _, _, width, code, name, *_ = line.split()
            widths[code] = int(width)
            clocks |= {code} if name == "clock" else set()
        elif line.startswith("#"):
            started = int(line[1:]) >= 10
        elif line[:1] in "01xzb" and line:
            bits, code = line[1:].split() if line[0] == "b" else (line[0], line[1:])
            if code in widths and code not in clocks:
                # leading zeros are left out of a dump
                bits = bits.rjust(widths[code], "0" if bits[0] in "01" else bits[0])
                before = values.get(code, bits)
                changed += started * sum(p != q for p, q in zip(before, bits, strict=True))
                values[code] = bits
    return changed
