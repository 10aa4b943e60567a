"""Byte planes under zstd: one frame per member of a tar, one zstd block per plane.

A plane holds one byte of every number. The low bytes of many numbers have other statistics than the high bytes. Since
zstd's entropy coder keeps one table a block, each plane starts a block of its own.
A frame has a checksum and its size, so that nothing larger than declared is ever allocated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

Array = np.ndarray[Any, np.dtype[Any]]
MAX_EMPTY_FRAME_BYTES = 64
LEVEL = 1  # only entropy coding gains here: higher levels search for matches, of which there are none


def split_planes(values: Array, width: int) -> list[Array]:
    """Splits numbers into `width` planes of bytes, lowest byte first."""
    # View each little-endian number as a row of bytes, then take the columns.  [n] → [n, 4 or 8] → width × [n]
    raw = np.ascontiguousarray(values, "<u8" if width > 4 else "<u4").reshape(-1, 1).view(np.uint8)
    return [np.ascontiguousarray(raw[:, byte]) for byte in range(width)]


def join_planes(planes: Sequence[Array]) -> Array:
    """Joins planes into the numbers that they hold, as uint32.

    Raises:
        ValueError: the planes are of different lengths.
    """
    if len({len(plane) for plane in planes}) != 1:
        raise ValueError(f"planes of one number have {[len(plane) for plane in planes]} bytes; wanted equally many")
    # Σ plane_b · 256^b over the planes b.  width × [n] → [n]
    total = planes[0].astype(np.uint32)
    for byte, plane in enumerate(planes[1:], 1):
        total |= plane.astype(np.uint32) << (8 * byte)
    return total


def bytes_for(largest: int) -> int:
    """Returns the number of bytes that hold `largest`, at least 1."""
    return max(1, (int(largest).bit_length() + 7) // 8)


def compress(planes: Sequence[Array]) -> bytes:
    """Compresses all planes into one frame."""
    total = sum(plane.nbytes for plane in planes)
    parameters = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    stream = parameters.compressobj(size=total)
    parts: list[bytes] = []
    for plane in planes:
        # A flush ends the zstd block, so the next plane gets an entropy table of its own.
        parts += [stream.compress(plane.tobytes()), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, stream.flush()])


def _decompress_empty(payload: bytes) -> bytes:
    """Decompresses a frame without content.

    `decompress` would return at once for it, and check neither the frame nor what follows it.
    """
    frame = zstandard.ZstdDecompressor().decompressobj()
    raw = frame.decompress(payload[:MAX_EMPTY_FRAME_BYTES])
    if not frame.eof or frame.unused_data or len(payload) > MAX_EMPTY_FRAME_BYTES:
        raise ValueError("an empty frame is followed by bytes, or cut off")
    return raw


def decompress(payload: bytes, sizes: Sequence[int]) -> list[Array]:
    """Decompresses a frame into its planes.

    It allocates as many bytes as `sizes` declare, so the caller checks them against bounds first.

    Raises:
        ValueError: the frame declares another size than that of the planes, or is damaged.
    """
    expected = sum(sizes)
    try:
        # Compare the declared size before anything of that size is allocated.
        declared = zstandard.get_frame_parameters(payload).content_size
        if declared != expected:
            raise ValueError(f"holds {declared} bytes; the header's planes have {expected}")
        raw = (
            zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
            if expected
            else _decompress_empty(payload)
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"not one whole zstd frame ({error})") from None
    if len(raw) != expected:
        raise ValueError(f"holds {len(raw)} bytes and declares {expected}")
    # Cut the bytes into planes, without a copy.  [Σ sizes] → [sizes_i] each
    data = np.frombuffer(raw, np.uint8)
    return np.split(data, np.cumsum(sizes)[:-1])
