"""Plain tars: members written with nothing that varies, and read back by their headers alone, strictly.

Only regular files with plain names exist here. Whatever else a tar can hold (links, devices, sparse files, long or
extended names, paths) is refused before anybody acts on it.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

RECORD = 512
END = bytes(2 * RECORD)
MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}(\.[A-Za-z0-9_]{1,20}){1,2}")


class Member(NamedTuple):
    """A member, and where its header begins."""

    name: str
    payload: bytes
    offset: int


def padded(size: int) -> int:
    """Bytes that a payload takes up."""
    return -(-size // RECORD) * RECORD


def member_bytes(name: str, payload: bytes) -> bytes:
    """Header, payload and padding of a member; owner, time and mode are fixed."""
    assert MEMBER_NAME.fullmatch(name), f"{name!r} is no name of a member"
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(payload), 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(padded(len(payload)) - len(payload))


def write_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A whole tar."""
    return b"".join([*(member_bytes(name, payload) for name, payload in members), END])


def read_members(data: bytes) -> Iterator[Member]:
    """Members of a run of a tar, up to its end, where only zeros may follow.

    Raises:
        ValueError: a header that is damaged or of anything but a plain file, a payload that is cut off, padding that
            is not empty; with the member's name where it has one, and the offset.
    """
    at = 0
    while at < len(data):
        header = data[at : at + RECORD]
        if not header.strip(b"\0"):
            if data[at:].strip(b"\0"):
                raise ValueError(f"offset {at}: the tar ends, but {len(data) - at} bytes follow that are not empty")
            return
        name, size = _plain_file(header, at)
        start = at + RECORD
        if start + padded(size) > len(data):
            raise ValueError(f"member {name}, offset {at}: declares {size} bytes; {len(data) - start} follow")
        if data[start + size : start + padded(size)].strip(b"\0"):
            raise ValueError(f"member {name}, offset {at}: its padding is not empty")
        yield Member(name, data[start : start + size], at)
        at = start + padded(size)


def _plain_file(header: bytes, at: int) -> tuple[str, int]:
    """Name and size from the header of a plain file."""
    try:
        found = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"offset {at}: not the header of a tar's member ({error})") from None
    if found.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError(f"member {found.name!r}, offset {at}: of type {found.type!r}; only plain files are read")
    if not MEMBER_NAME.fullmatch(found.name):
        raise ValueError(f"member {found.name!r}, offset {at}: wanted a plain name, as 00000000.json")
    if found.size < 0:
        raise ValueError(f"member {found.name}, offset {at}: declares {found.size} bytes")
    if found.linkname or found.tobuf(tarfile.USTAR_FORMAT) != header:
        raise ValueError(f"member {found.name}, offset {at}: its header has fields that a plain file has not")
    return found.name, found.size
