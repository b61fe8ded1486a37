"""Fields of a block: where the bits of its parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.models.gguf.types import Bytes, Parts, runs
from nybble.packing._nibbles import apart, interleave


@dataclass(frozen=True)
class Raw:
    """Bytes of a part as they are: a float16 ``d`` or ``m``, or codes of 8 bits."""

    part: str
    nbytes: int = 2

    def read(self, data: Bytes) -> Parts:
        return {self.part: data}

    def write(self, parts: Parts) -> Bytes:
        return parts[self.part]


@dataclass(frozen=True)
class Plane:
    """Some bits of all codes of a part, several codes in a byte.

    Byte j of a run holds, from its low bits on, the codes j, j + run, j + 2 run ... of that run's part.

    Attributes:
        part: whose codes. nbytes: of the field. bits: of each code that are here, 1, 2 or 4. run: bytes.
        shift: which bits of the code these are.
    """

    part: str
    nbytes: int
    bits: int
    run: int
    shift: int = 0

    def read(self, data: Bytes) -> Parts:
        per, mask, count = 8 // self.bits, np.uint8((1 << self.bits) - 1), len(data)
        data = np.ascontiguousarray(data)
        out = np.empty((count, self.nbytes // self.run, per, self.run), np.uint8)
        for place in range(per):
            bits = data >> np.uint8(place * self.bits) if place else data
            if place < per - 1:
                bits = bits & mask
            bits = bits << np.uint8(self.shift) if self.shift else bits
            runs(out)[:, :, place] = runs(bits.reshape(count, -1, self.run))
        return {self.part: out.reshape(count, -1)}

    def write(self, parts: Parts) -> Bytes:
        per, mask, count = 8 // self.bits, np.uint8((1 << self.bits) - 1), len(parts[self.part])
        codes = runs(np.ascontiguousarray(parts[self.part]).reshape(count, -1, per, self.run))
        out = np.zeros((count, self.nbytes), np.uint8)
        for place in range(per):
            part = np.ascontiguousarray(codes[:, :, place]).view(np.uint8).reshape(count, -1)
            part = part >> np.uint8(self.shift) if self.shift else part
            if place < per - 1:
                part = part & mask
            out |= part << np.uint8(place * self.bits) if place else part
        return out


@dataclass(frozen=True)
class Pairs:
    """All codes of a part in four bits, as a :class:`Plane` has them; two stay in a byte in any order.

    Attributes:
        part: whose codes; two to a byte, the first in the low half. nbytes: of the field. run: bytes, a multiple of 8.
    """

    part: str
    nbytes: int
    run: int

    def read(self, data: Bytes) -> Parts:
        out = np.empty((len(data), self.nbytes // self.run, 2, self.run // 2), np.uint8)
        halves = apart(np.ascontiguousarray(data).reshape(len(data), -1, self.run))
        for side, half in enumerate(halves):
            runs(out)[:, :, side] = runs(half)
        return {self.part: out.reshape(len(data), -1)}

    def write(self, parts: Parts) -> Bytes:
        codes = runs(parts[self.part].reshape(len(parts[self.part]), -1, 2, self.run // 2))
        low, high = (np.ascontiguousarray(codes[:, :, side]).view(np.uint8) for side in (0, 1))
        return interleave(low, high).reshape(len(codes), -1)


@dataclass(frozen=True)
class LowHigh:
    """Byte j has code j of ``low`` in its low half and code j of ``high`` in the other (Q2_K's scales and minima)."""

    low: str
    high: str
    nbytes: int

    def read(self, data: Bytes) -> Parts:
        return {self.low: data & np.uint8(15), self.high: data >> np.uint8(4)}

    def write(self, parts: Parts) -> Bytes:
        return parts[self.low] | parts[self.high] << np.uint8(4)


@dataclass(frozen=True)
class SixBits:
    """Eight scales and eight minima of six bits in twelve bytes (Q4_K, Q5_K).

    The first four of each have the low six bits of bytes 0-3 and 4-7; the top two bits of those bytes belong to the
    last four, whose low halves share bytes 8-11.
    """

    low: str = "scale"
    high: str = "offset"
    nbytes: int = 12

    def read(self, data: Bytes) -> Parts:
        first, second, rest = data[:, 0:4], data[:, 4:8], data[:, 8:12]
        top, six = np.uint8(0x30), np.uint8(63)
        return {
            self.low: np.concatenate([first & six, rest & np.uint8(15) | first >> np.uint8(2) & top], 1),
            self.high: np.concatenate([second & six, rest >> np.uint8(4) | second >> np.uint8(2) & top], 1),
        }

    def write(self, parts: Parts) -> Bytes:
        low, high = parts[self.low], parts[self.high]
        top = np.uint8(0x30)
        return np.concatenate(
            [
                low[:, :4] | (low[:, 4:] & top) << np.uint8(2),
                high[:, :4] | (high[:, 4:] & top) << np.uint8(2),
                low[:, 4:] & np.uint8(15) | high[:, 4:] << np.uint8(4),
            ],
            1,
        )


@dataclass(frozen=True)
class Trits:
    """Ternary digits, five to a byte as a fraction: byte = ceil(256 / 243 * (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4)).

    Digit k of byte j of a run is element j + k run: multiplying by 3 moves the next digit above the byte. The digits
    are value + 1; codes are those of ``ternary`` (0, 1, and 3 for -1). The last bytes hold four.
    """

    part: str
    runs: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """One for each of a run."""
        return sum(run for run, _ in self.runs)

    def read(self, data: Bytes) -> Parts:
        found: list[Any] = []
        at = 0
        for run, digits in self.runs:
            part = data[:, at : at + run]
            for place in range(digits):
                shifted = (part * np.uint8(3**place)).astype(np.uint16)  # modulo 256: digits above are gone
                found.append((shifted * np.uint16(3) >> np.uint16(8)).astype(np.uint8))
            at += run
        digit = np.concatenate(found, 1)
        return {self.part: digit - np.uint8(1) & np.uint8(3)}

    def write(self, parts: Parts) -> Bytes:
        digit = (parts[self.part] + np.uint8(1) & np.uint8(3)).astype(np.uint16)
        found: list[Any] = []
        at = 0
        for run, digits in self.runs:
            value = np.zeros((len(digit), run), np.uint16)
            for place in range(digits):
                value += digit[:, at : at + run] * np.uint16(3 ** (4 - place))
                at += run
            found.append(((value * np.uint32(256) + 242) // 243).astype(np.uint8))
        return np.concatenate(found, 1)
