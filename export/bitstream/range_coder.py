"""A range coder: symbols as a number in an interval that each of them narrows, in exact integers.

G. N. N. Martin, "Range encoding" (1979), with carries; CONTAINER.md has every step of it. The bytes are the same on
every machine. Whoever knows the chances says them as a symbol's start and frequency out of a total.

A library (`constriction`) would write other bytes, and be one more compiled package for a bundle to load. Bit planes
have a coder of their own (`codecs/implicit/bitplane_coder.py`).
"""

from collections.abc import Callable

__all__ = ["Cut", "Damage", "RangeDecoder", "RangeEncoder"]

WINDOW = 7  # bytes that the decoder holds
WHOLE = 1 << 8 * WINDOW  # the range at the start
LEAST = WHOLE >> 8  # below it a byte goes out


class Cut(Exception):
    """The bytes that arrived leave open what the next symbol is."""


class Damage(Exception):
    """No encoder has written this."""


class RangeEncoder:
    """Writes symbols."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._low = 0
        self._range = WHOLE

    def encode(self, start: int, frequency: int, total: int) -> None:
        """Write a symbol that has `frequency` of `total` chances, after a total of `start` before it."""
        share = self._range // total
        self._low += share * start
        self._range = share * frequency
        if self._low >= WHOLE:
            self._carry()
        while self._range < LEAST:
            self._out.append(self._low // LEAST)
            self._low = self._low % LEAST << 8
            self._range <<= 8

    def finish(self) -> bytes:
        """Return the bytes, as few as identify the last symbol, without trailing zeros."""
        for count in range(WINDOW + 1):
            unit = WHOLE >> 8 * count
            number = -(-self._low // unit) * unit
            if number < self._low + self._range:
                break
        self._low = number
        if self._low >= WHOLE:
            self._carry()
        return bytes(self._out + self._low.to_bytes(WINDOW, "big")).rstrip(b"\0")

    def _carry(self) -> None:
        self._low -= WHOLE
        at = len(self._out) - 1
        while self._out[at] == 255:
            self._out[at] = 0
            at -= 1
        self._out[at] += 1


class RangeDecoder:
    """Reads symbols.

    Args:
        data: The output of `RangeEncoder.finish`, or its beginning.
        whole: Whether it is complete: zeros follow then. Otherwise symbols are returned as long
            as they don't depend on the bytes that follow.
    """

    def __init__(self, data: bytes, whole: bool = True) -> None:
        self._data = data
        self._at = 0
        self._range = WHOLE
        self._code = 0
        self._open = 0  # how much larger the code could be, by bytes that did not arrive
        self._whole = whole
        for _ in range(WINDOW):
            self._take()

    def decode(self, total: int, symbol: Callable[[int], tuple[int, int, int]]) -> int:
        """Read a symbol.

        Args:
            total: Sum of the frequencies.
            symbol: Gives the symbol on which one of the chances, 0 to total - 1, falls, its start and its frequency.

        Raises:
            Cut: It isn't known.
            Damage: No symbol is there.
        """
        share = self._range // total
        slot, last = self._code // share, (self._code + self._open) // share
        if slot >= total and not self._open:
            raise Damage
        found, start, frequency = symbol(min(slot, total - 1))
        if last >= start + frequency and self._open:
            raise Cut
        self._code -= share * start
        self._range = share * frequency
        while self._range < LEAST:
            self._range <<= 8
            self._take()
        return found

    def _take(self) -> None:
        there = self._at < len(self._data)
        self._code = self._code << 8 | (self._data[self._at] if there else 0)
        self._open = self._open << 8 | (0 if there or self._whole else 255)
        self._at += 1
