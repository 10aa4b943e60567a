"""Numbers as byte planes under zstd: a member of a tar is one frame, each plane of it starts a block of its own.

The low bytes of many numbers compress by their own statistics, the high bytes by theirs; zstd's entropy coder keeps
one table a block. A frame has a checksum and its size, so that nothing larger than declared is ever allocated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

Array = np.ndarray[Any, np.dtype[Any]]
MOST_OF_NOTHING = 64  # bytes of an empty frame, at the most
LEVEL = 1  # entropy coding is all there is to gain; higher levels search for matches that are not there


def split(values: Array, width: int) -> list[Array]:
    """`width` planes of bytes, lowest first."""
    raw = np.ascontiguousarray(values, "<u8" if width > 4 else "<u4").reshape(-1, 1).view(np.uint8)
    return [np.ascontiguousarray(raw[:, byte]) for byte in range(width)]


def join(planes: Sequence[Array]) -> Array:
    """The numbers again, as uint32.

    Raises:
        ValueError: the planes are of different lengths.
    """
    if len({len(plane) for plane in planes}) != 1:
        raise ValueError(f"planes of one number have {[len(plane) for plane in planes]} bytes; wanted equally many")
    total = planes[0].astype(np.uint32)
    for byte, plane in enumerate(planes[1:], 1):
        total |= plane.astype(np.uint32) << (8 * byte)
    return total


def width_of(largest: int) -> int:
    """Bytes that hold `largest`."""
    return max(1, (int(largest).bit_length() + 7) // 8)


def compress(planes: Sequence[Array]) -> bytes:
    """One frame of all planes."""
    total = sum(plane.nbytes for plane in planes)
    parameters = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    stream = parameters.compressobj(size=total)
    parts: list[bytes] = []
    for plane in planes:
        parts += [stream.compress(plane.tobytes()), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, stream.flush()])


def _empty(payload: bytes) -> bytes:
    """What a frame of nothing holds: `decompress` would not look at it, nor at what follows."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    raw = frame.decompress(payload[:MOST_OF_NOTHING])
    if not frame.eof or frame.unused_data or len(payload) > MOST_OF_NOTHING:
        raise ValueError("a frame of nothing is followed by something, or cut off")
    return raw


def decompress(payload: bytes, sizes: Sequence[int]) -> list[Array]:
    """The planes of a frame; allocates what `sizes` declare, so they must be in bounds.

    Raises:
        ValueError: it declares another size than that of the planes, or is damaged.
    """
    wanted = sum(sizes)
    try:
        declared = zstandard.get_frame_parameters(payload).content_size
        if declared != wanted:
            raise ValueError(f"holds {declared} bytes; the header's planes have {wanted}")
        raw = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False) if wanted else _empty(payload)
    except zstandard.ZstdError as error:
        raise ValueError(f"not one whole zstd frame ({error})") from None
    if len(raw) != wanted:
        raise ValueError(f"holds {len(raw)} bytes and declares {wanted}")
    data = np.frombuffer(raw, np.uint8)
    return np.split(data, np.cumsum(sizes)[:-1])
