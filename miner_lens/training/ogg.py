"""Ogg files without the random serial number that libsndfile gives them."""

from __future__ import annotations

import struct
from functools import cache


def with_serial(ogg: bytes, serial: int) -> bytes:
    """The same Ogg stream under another serial number, each page with its new checksum."""
    pages, start = [], 0
    while start < len(ogg):
        segments = ogg[start + 26]
        body = sum(ogg[start + 27 : start + 27 + segments])
        end = start + 27 + segments + body
        page = bytearray(ogg[start:end])
        page[14:18], page[22:26] = struct.pack("<I", serial), bytes(4)
        page[22:26] = struct.pack("<I", _checksum(page))
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def _checksum(page: bytearray) -> int:
    """Ogg's cyclic redundancy check of a page whose checksum field is zero."""
    register = 0
    for byte in page:
        register = (register << 8 & 0xFFFFFFFF) ^ _table()[register >> 24 ^ byte]
    return register


@cache
def _table() -> tuple[int, ...]:
    table = []
    for register in range(0, 256 << 24, 1 << 24):
        for _ in range(8):
            register = (register << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if register >> 31 else 0)
        table.append(register)
    return tuple(table)
