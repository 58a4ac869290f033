"""A zlib stream of the bytes of RGB pixels that are nearly all 0, made from where the others are.

zlib looks at each byte, which takes most of the time that an image's labels take to write, though of the 922,080 bytes
of a 640 x 480 panoptic PNG, stored as differences to the row above, all but a few thousand are 0. Here nothing is done
for these. It finds runs of zeros and equal neighbours; Huffman's codes are fixed beforehand, for maps of
segments, in which small differences and the longest runs are most frequent.

Source: RFC 1950 (zlib), RFC 1951 (DEFLATE).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

PIXEL = 3  # bytes
ADLER = 65521  # the largest prime below 2**16
END = 256  # the symbol that ends a block
FIRST_LENGTH = 257  # that of a match of 3 bytes
EXTRA_BITS = [0] * 8 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4 + [0]  # of the symbols of lengths
LONGEST = 258  # bytes of a match
COUNT = 32
ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)  # in which a header has lengths of codes

Code = tuple[int, int]  # the bits, the first one lowest, and how many


class Codes(NamedTuple):
    """Codes are int64: the bits, and above COUNT how many.

    Attributes:
        header: what a block begins with.
        literal: of each byte, and of END: [257].
        zeros: of 0 to LONGEST - 1 zeros that follow one, and of LONGEST.
        pixels: of a match of so many bytes with the pixel before; of fewer than 3 an empty code.
    """

    header: Code
    literal: np.ndarray
    zeros: np.ndarray
    pixels: np.ndarray


def zlib_stream(places: np.ndarray, values: np.ndarray, size: int) -> bytes:
    """Compresses bytes.

    Args:
        places: where they are not 0, int64 [N], rising; the first is 0.
        values: the bytes at these places, uint8 [N].
        size: how many bytes there are.
    """
    total = 1 + int(values.sum(dtype=np.int64))
    later = size + int(((size - places) % ADLER * values).sum())
    checksum = later % ADLER << 16 | total % ADLER
    return b"\x78\x01" + _packed(_tokens(places, values, size)) + checksum.to_bytes(4, "big")


def _tokens(places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The codes after the header, int64. Equal bytes a pixel apart are taken together, and each of these, or of single
    bytes, with the zeros up to the next becomes:

    1. the byte; zeros, to the end of its pixel if it is repeated, else one if one follows, for matches to begin with;
       and if it is repeated, a match with the pixel before, of what LONGEST leaves of the repetitions' bytes
    2. matches of LONGEST with the pixel before, as many as there are
    3. zeros, what LONGEST leaves of the rest
    4. LONGEST zeros, as many times as there are
    """
    codes = _codes()
    gaps = _steps(places, size)
    begins = np.ones(len(places), dtype=bool)
    begins[1:] = (gaps[:-1] != PIXEL) | (values[1:] != values[:-1]) | (gaps[1:] < PIXEL)
    first = np.flatnonzero(begins)
    places, values = places[first], values[first]
    repeated = PIXEL * (_steps(first, len(begins)) - 1)
    zeros = _steps(places, size) - 1 - repeated
    near = np.minimum(zeros, 1 + (PIXEL - 2) * (repeated > 0))
    tokens, times = np.zeros((2, len(first) + 1, 4), dtype=np.int64)
    tokens[-1, 0], tokens[:, 1], tokens[:, 3] = codes.literal[END], codes.pixels[LONGEST], codes.zeros[LONGEST]
    times[:, 0] = times[:-1, 2] = 1
    times[:-1, 1], rest = np.divmod(repeated, LONGEST)
    byte = codes.literal.take(values) + near * (codes.literal[0] >> COUNT << COUNT)  # a zero's bits are 0
    match = codes.pixels.take(rest)
    bits = match & (1 << COUNT) - 1
    tokens[:-1, 0] = byte + (match - bits) + (bits << (byte >> COUNT))
    times[:-1, 3], rest = np.divmod(zeros - near, LONGEST)
    tokens[:-1, 2] = codes.zeros.take(rest)
    return tokens.repeat(times.ravel())


def _steps(places: np.ndarray, size: int) -> np.ndarray:
    """From each place to the next, and from the last to `size`."""
    steps = np.empty_like(places)
    np.subtract(places[1:], places[:-1], out=steps[:-1])
    steps[-1] = size - places[-1]
    return steps


def _packed(tokens: np.ndarray) -> bytes:
    """The header and codes. None of these has more than 31 bits, so that one begins in each word of 32."""
    value, count = _codes().header
    whole, rest = count // 8, count % 8  # bytes and bits of the header
    end = np.cumsum(tokens >> COUNT)
    end += rest
    begin = end - (tokens >> COUNT)
    word = begin >> 5
    first = np.append(0, np.flatnonzero(word[1:] != word[:-1]) + 1)
    words = np.append(np.add.reduceat((tokens & (1 << COUNT) - 1) << (begin & 31), first), 0)
    words[0] |= value >> 8 * whole
    words[1:] += words[:-1] >> 32
    header = (value & (1 << 8 * whole) - 1).to_bytes(whole, "little")
    return header + words.astype("<u4").tobytes()[: -(-int(end[-1]) // 8)]


def _bits_of_symbols() -> list[int]:
    """Of each symbol's code, by how frequent it is in maps of segments."""
    bits = [12] * (FIRST_LENGTH + len(EXTRA_BITS))
    bits[0] = 2
    for difference in range(1, 17):
        bits[difference] = bits[256 - difference] = 7 if difference <= 8 else 11
    bits[FIRST_LENGTH:] = [6] * (len(EXTRA_BITS) - 1) + [3]
    return bits


@lru_cache(maxsize=1)
def _codes() -> Codes:
    bits = _bits_of_symbols()
    distances = [1] + [0] * (PIXEL - 2) + [1]  # symbols of a distance of 1 byte, and of a pixel
    codes = _huffman(bits)
    matches = []
    for symbol, extra in enumerate(EXTRA_BITS, FIRST_LENGTH):
        code, length = codes[symbol]
        matches += [(code | more << length, length + extra) for more in range(1 << extra)]
    matches[LONGEST - 3 :] = [codes[FIRST_LENGTH + len(EXTRA_BITS) - 1]]  # the symbol before could have said it too
    near, far = ([(code | distance << length, length + 1) for code, length in matches] for distance in (0, 1))
    literal = [codes[symbol] for symbol in range(END + 1)]
    zeros, pixels = [(0, number * bits[0]) for number in range(3)] + near, [(0, 0)] * 3 + far
    tables = [np.array([code | length << COUNT for code, length in table]) for table in (literal, zeros, pixels)]
    return Codes(_header(bits, distances), *tables)


def _header(bits: list[int], distances: list[int]) -> Code:
    """That of a stream's only block, which has codes of its own; those for the lengths of its codes have 3 bits."""
    used = sorted({*bits, *distances})
    used += [length for length in range(16) if length not in used][: 8 - len(used)]  # a code must be complete
    written = max(ORDER.index(length) for length in used) + 1
    fields = [(1, 1), (2, 2), (len(bits) - 257, 5), (len(distances) - 1, 5), (written - 4, 4)]
    fields += [(3 * (length in used), 3) for length in ORDER[:written]]
    codes = _huffman([3 * (length in used) for length in range(len(ORDER))])
    fields += [codes[length] for length in (*bits, *distances)]
    value = count = 0
    for field, length in fields:
        value, count = value | field << count, count + length
    return value, count


def _huffman(bits: list[int]) -> dict[int, Code]:
    """The code of each symbol that has one, by the bits of all. RFC 1951, 3.2.2."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(bits) if length):
        code <<= length - before
        codes[symbol] = (int(f"{code:0{length}b}"[::-1], 2), length)
        code, before = code + 1, length
    return codes
