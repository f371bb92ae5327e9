"""CityHash128 as ClickHouse computes it (version 1.0.2): the checksum of a block in its own compressed format.

The algorithm is that of Geoff Pike and Jyrki Alakuijala (Google). Later versions of it give other values, and no dependency
of kprobe carries this one. Pure Python, about 16 MB/s: enough for the rare client that asks for `compress=1`; HTTP
compression, which everybody else uses, needs no checksum of ours.
"""

from struct import unpack_from
from typing import Final

__all__ = ["cityhash128"]

_MASK: Final = (1 << 64) - 1
_K0: Final = 0xC3A5C85C97CB3127
_K1: Final = 0xB492B66FBE98F273
_K2: Final = 0x9AE16A3B2F90404F
_K3: Final = 0xC949D7C7509E6557
_MUL: Final = 0x9DDFEA08EB382D69


def cityhash128(data: bytes) -> tuple[int, int]:
    """The (low, high) halves of the hash."""
    size = len(data)
    if size >= 16:
        return _seeded(data[16:], _word(data, 0) ^ _K3, _word(data, 8))
    if size >= 8:
        return _seeded(b"", _word(data, 0) ^ (size * _K0 & _MASK), _word(data, size - 8) ^ _K1)
    return _seeded(data, _K0, _K1)


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _rotate(value: int, bits: int) -> int:
    return (value >> bits | value << 64 - bits) & _MASK if bits else value


def _mix(value: int) -> int:
    return value ^ value >> 47


def _pair(low: int, high: int) -> int:
    a = _mix((low ^ high) * _MUL & _MASK)
    return _mix((high ^ a) * _MUL & _MASK) * _MUL & _MASK


def _up_to_16(data: bytes) -> int:
    size = len(data)
    if size > 8:
        a, b = _word(data, 0), _word(data, size - 8)
        return _pair(a, _rotate((b + size) & _MASK, size)) ^ b
    if size >= 4:
        a = int.from_bytes(data[:4], "little")
        return _pair((size + (a << 3)) & _MASK, int.from_bytes(data[-4:], "little"))
    if size > 0:
        y = data[0] + (data[size >> 1] << 8)
        z = size + (data[-1] << 2)
        return _mix((y * _K2 ^ z * _K3) & _MASK) * _K2 & _MASK
    return _K2


def _weak(w: int, x: int, y: int, z: int, a: int, b: int) -> tuple[int, int]:
    a = (a + w) & _MASK
    b = _rotate((b + a + z) & _MASK, 21)
    c = a
    a = (a + x + y) & _MASK
    return (a + z) & _MASK, (b + _rotate(a, 44) + c) & _MASK


def _murmur(data: bytes, a: int, b: int) -> tuple[int, int]:
    """The hash of fewer than 128 bytes."""
    size = len(data)
    if size <= 16:
        a = _mix(a * _K1 & _MASK) * _K1 & _MASK
        c = (b * _K1 + _up_to_16(data)) & _MASK
        d = _mix((a + (_word(data, 0) if size >= 8 else c)) & _MASK)
    else:
        c = _pair((_word(data, size - 8) + _K1) & _MASK, a)
        d = _pair((b + size) & _MASK, (c + _word(data, size - 16)) & _MASK)
        a = (a + d) & _MASK
        at, left = 0, size - 16
        while left > 0:
            a = (a ^ _mix(_word(data, at) * _K1 & _MASK) * _K1 & _MASK) * _K1 & _MASK
            b ^= a
            c = (c ^ _mix(_word(data, at + 8) * _K1 & _MASK) * _K1 & _MASK) * _K1 & _MASK
            d ^= c
            at, left = at + 16, left - 16
    a, b = _pair(a, c), _pair(d, b)
    return a ^ b, _pair(b, a)


def _round(words: tuple[int, ...], x: int, y: int, z: int, v: tuple[int, int], w: tuple[int, int]) -> tuple[int, ...]:
    """One step of the long hash over 64 bytes; returns x, y, z, v, w flattened."""
    x = _rotate((x + y + v[0] + words[2]) & _MASK, 37) * _K1 & _MASK
    y = _rotate((y + v[1] + words[6]) & _MASK, 42) * _K1 & _MASK
    x ^= w[1]
    y ^= v[0]
    z = _rotate(z ^ w[0], 33)
    v = _weak(words[0], words[1], words[2], words[3], v[1] * _K1 & _MASK, (x + w[0]) & _MASK)
    w = _weak(words[4], words[5], words[6], words[7], (z + w[1]) & _MASK, y)
    return z, y, x, *v, *w  # the original swaps z and x here


def _seeded(data: bytes, low: int, high: int) -> tuple[int, int]:
    size = len(data)
    if size < 128:
        return _murmur(data, low, high)
    x, y, z = low, high, size * _K1 & _MASK
    v0 = (_rotate(y ^ _K1, 49) * _K1 + _word(data, 0)) & _MASK
    v = (v0, (_rotate(v0, 42) * _K1 + _word(data, 8)) & _MASK)
    w0 = (_rotate((y + z) & _MASK, 35) * _K1 + x) & _MASK
    w = (w0, _rotate((x + _word(data, 88)) & _MASK, 53) * _K1 & _MASK)
    at = 0
    while size - at >= 128:
        for _ in range(2):
            x, y, z, v_low, v_high, w_low, w_high = _round(unpack_from("<8Q", data, at), x, y, z, v, w)
            v, w, at = (v_low, v_high), (w_low, w_high), at + 64
    return _finish(data, at, x, y, z, v, w)


def _finish(data: bytes, at: int, x: int, y: int, z: int, v: tuple[int, int], w: tuple[int, int]) -> tuple[int, int]:
    """The last 0 to 127 bytes, in pieces of 32 from the end (they may reach back into what was hashed already)."""
    y = (y + _rotate(w[0], 37) * _K0 + z) & _MASK
    x = (x + _rotate((v[0] + z) & _MASK, 49) * _K0) & _MASK
    size, done = len(data), 0
    while done < size - at:
        done += 32
        piece: tuple[int, int, int, int] = unpack_from("<4Q", data, size - done)
        y = (_rotate((y - x) & _MASK, 42) * _K0 + v[1]) & _MASK
        w = ((w[0] + piece[2]) & _MASK, w[1])
        x = (_rotate(x, 49) * _K0 + w[0]) & _MASK
        w = ((w[0] + v[0]) & _MASK, w[1])
        v = _weak(*piece, *v)
    x, y = _pair(x, v[0]), _pair(y, w[0])
    return (_pair((x + v[1]) & _MASK, w[1]) + y) & _MASK, _pair((x + w[1]) & _MASK, (y + v[1]) & _MASK)
