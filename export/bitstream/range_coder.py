"""A range coder in exact integers, so that its bytes are the same on every machine.

G. N. N. Martin, "Range encoding" (1979), with carry propagation; CONTAINER.md specifies each step. The caller's model
passes each symbol's cumulative frequency (`start`), its frequency, and the total.

The library `constriction` would write other bytes, and loading a bundle would need one more compiled package. Bit
planes have their own coder (`codecs/implicit/bitplane_coder.py`).
"""

from collections.abc import Callable

__all__ = ["Cut", "Damage", "RangeDecoder", "RangeEncoder"]

WINDOW = 7  # bytes of the decoder's state
WHOLE = 1 << 8 * WINDOW  # initial range
LEAST = WHOLE >> 8  # a smaller range is renormalized: one byte is written or read


class Cut(Exception):
    """The data is truncated: the next symbol is ambiguous."""


class Damage(Exception):
    """The data is no output of the encoder."""


class RangeEncoder:
    """Range encoder of a symbol sequence.

    Example:
        >>> encoder = RangeEncoder()
        >>> for symbol in (0, 2, 1):  # uniform over 4 symbols: 2 bits each
        ...     encoder.encode(start=symbol, frequency=1, total=4)
        >>> data = encoder.finish()
        >>> decoder = RangeDecoder(data)
        >>> len(data), [decoder.decode(4, lambda slot: (slot, slot, 1)) for _ in range(3)]
        (1, [0, 2, 1])
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._low = 0
        self._range = WHOLE

    def encode(self, start: int, frequency: int, total: int) -> None:
        """Encode a symbol of probability `frequency / total`; `start` is the sum of the frequencies before it."""
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
        """Return the shortest bytes that identify all symbols, without trailing zeros."""
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
    """Range decoder of a symbol sequence.

    Args:
        data: The output of `RangeEncoder.finish`, or a prefix of it.
        whole: Whether `data` is complete; zeros follow it then. Of a prefix, symbols are decoded as long as they don't
            depend on the missing bytes.
    """

    def __init__(self, data: bytes, whole: bool = True) -> None:
        self._data = data
        self._at = 0
        self._range = WHOLE
        self._code = 0
        self._open = 0  # maximum by which the missing bytes could raise the code
        self._whole = whole
        for _ in range(WINDOW):
            self._take()

    def decode(self, total: int, symbol: Callable[[int], tuple[int, int, int]]) -> int:
        """Decode a symbol.

        Args:
            total: Sum of all frequencies.
            symbol: Maps a value in [0, total) to the symbol whose interval contains it, its start and its frequency.

        Raises:
            Cut: The symbol depends on missing bytes.
            Damage: The value exceeds the total.
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
