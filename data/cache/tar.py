"""Plain tars: a writer whose bytes depend on the members alone, and a strict reader.

Only regular files with plain names are written and read. Whatever else a tar can hold (links, devices, sparse files,
long or extended names, paths) raises an error while its header is read.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

RECORD_BYTES = 512  # bytes of a tar record: headers and payloads are padded to it
END_OF_TAR = bytes(2 * RECORD_BYTES)
MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}(\.[A-Za-z0-9_]{1,20}){1,2}")


class Member(NamedTuple):
    """A member of a tar. Its header begins at `offset`."""

    name: str
    payload: bytes
    offset: int


def padded_size(size: int) -> int:
    """Returns the bytes that a payload of `size` takes with its padding."""
    return -(-size // RECORD_BYTES) * RECORD_BYTES


def encode_member(name: str, payload: bytes) -> bytes:
    """Returns header, payload and padding of a member. Owner, time and mode are fixed."""
    assert MEMBER_NAME.fullmatch(name), f"{name!r} is not a valid member name"
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(payload), 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(padded_size(len(payload)) - len(payload))


def encode_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Returns the bytes of a whole tar."""
    return b"".join([*(encode_member(name, payload) for name, payload in members), END_OF_TAR])


def read_members(data: bytes) -> Iterator[Member]:
    """Yields the members of a part of a tar, until it ends or only zeros follow.

    Raises:
        ValueError: a header is damaged or not that of a plain file, a payload is cut off, or padding is not empty. The
            message has the offset, and the member's name where it is known.
    """
    offset = 0
    while offset < len(data):
        header = data[offset : offset + RECORD_BYTES]
        if not header.strip(b"\0"):
            if data[offset:].strip(b"\0"):
                raise ValueError(
                    f"offset {offset}: the tar ends, but {len(data) - offset} bytes follow that are not empty"
                )
            return
        name, size = _parse_header(header, offset)
        start = offset + RECORD_BYTES
        if start + padded_size(size) > len(data):
            raise ValueError(f"member {name}, offset {offset}: declares {size} bytes; {len(data) - start} follow")
        if data[start + size : start + padded_size(size)].strip(b"\0"):
            raise ValueError(f"member {name}, offset {offset}: its padding is not empty")
        yield Member(name, data[start : start + size], offset)
        offset = start + padded_size(size)


def _parse_header(header: bytes, offset: int) -> tuple[str, int]:
    """Returns the name and the size that the header of a plain file declares."""
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"offset {offset}: not the header of a tar's member ({error})") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError(f"member {info.name!r}, offset {offset}: has type {info.type!r}; only plain files are read")
    if not MEMBER_NAME.fullmatch(info.name):
        raise ValueError(f"member {info.name!r}, offset {offset}: wanted a plain name, as 00000000.json")
    if info.size < 0:
        raise ValueError(f"member {info.name}, offset {offset}: declares {info.size} bytes")
    # Writing the same fields again must give the same bytes: no field that this reader ignores can hide in a header.
    if info.linkname or info.tobuf(tarfile.USTAR_FORMAT) != header:
        raise ValueError(f"member {info.name}, offset {offset}: its header has fields that a plain file does not have")
    return info.name, info.size
