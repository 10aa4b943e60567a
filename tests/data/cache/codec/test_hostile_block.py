"""Blocks made to harm a reader, whose hashes would be right: refused with the member named, and nothing large made."""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard

from data.cache.codec.block import decode_block, encode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import MAX_ENTRIES_A_BLOCK, MAX_POSITIONS, Header
from data.cache.codec.planes import compress, decompress
from data.cache.codec.ranks import Ragged, decode_ranks
from data.cache.selection import Selection
from tests.data.cache.codec.randoms import Case, make

Members = dict[str, bytes]
MIB = 1 << 20


def _block(codec: str = "standard", *, ragged: bool = True) -> tuple[Members, Coding]:
    selection = Selection(top_k=6, draws=3, tail_temperatures=(2.0,))
    records, coding = make(Case(2, 300, (12, 20), selection, codec, 1.0, ragged=ragged))
    return encode_block(0, records, coding)[0], coding


def _bomb(size: int) -> bytes:
    """A frame of zeros that declares its size."""
    stream = zstandard.ZstdCompressor(level=1, write_content_size=True).compressobj(size=size)
    return b"".join([*(stream.compress(bytes(MIB)) for _ in range(size // MIB)), stream.flush()])


def _header(members: Members, change: Callable[[dict[str, Any]], None]) -> Members:
    value = json.loads(members["json"])
    change(value)
    return {**members, "json": json.dumps(value).encode()}


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *outer, last = path.split("/")

    def change(found: Any) -> None:
        for name in outer:
            found = found[int(name) if isinstance(found, list) else name]
        found[int(last) if isinstance(found, list) else last] = value

    return change


def _sizes(member: str, change: Callable[[list[int]], list[int]]) -> Callable[[dict[str, Any]], None]:
    def changed(found: dict[str, Any]) -> None:
        found["planes"][member] = change(found["planes"][member])

    return changed


HEADERS = {
    "records are none": _set("records", []),
    "records are a number": _set("records", 3),
    "a record is short": _set("records/0", ["doc", 0]),
    "positions are many": _set("records/0/2", MAX_POSITIONS + 1),
    "positions are a billion billions": _set("records/0/2", 10**18),
    "positions have a thousand digits": _set("records/0/2", 10**1000),
    "positions are negative": _set("records/0/2", -1),
    "positions are a truth": _set("records/0/2", True),
    "positions are a fraction": _set("records/0/2", 12.0),
    "positions are not finite": _set("records/0/2", float("inf")),
    "positions are words": _set("records/0/2", "12"),
    "one position is missing": _set("records/0/2", 11),
    "a document is a number": _set("records/0/0", 1),
    "a start is negative": _set("records/0/1", -1),
    "entries are many": _set("entries", 65536),
    "entries are more than there are": _set("entries", 60000),
    "entries are none": _set("entries", None),
    "samples are more than there are": _set("samples", 4),
    "samples are a list": _set("samples", [3]),
    "first is negative": _set("first", -1),
    "planes are a list": _set("planes", []),
    "a member has no planes": _set("planes/tokens.zst", []),
    "a plane is negative": _sizes("tokens.zst", lambda s: [s[0] + 5, s[1] - 5, *s[2:], -s[2]]),
    "a plane is huge": _sizes("entries.zst", lambda s: [10**15, *s[1:]]),
    "a plane is a terabyte": _sizes("log_probs.zst", lambda s: [*s[:-1], 1 << 40]),
    "a plane's byte moves to the next": _sizes("entries.zst", lambda s: [s[0] - 1, s[1] + 1, *s[2:]]),
    "a plane is split": _sizes("entries.zst", lambda s: [*s[:-1], s[-1], 0]),
    "planes of an unknown member": _set("planes/more.zst", []),
    "a field is unknown": _set("more", 1),
    "the audit is words": _set("audit/kl_mean", "small"),
    "the audit is not a number": _set("audit/kl_mean", float("nan")),
}


@pytest.mark.parametrize("codec", ["standard", "lossless"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str, codec: str) -> None:
    members, coding = _block(codec)
    members = _header(members, HEADERS[name])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^(json|\w+\.zst): "):
        decode_block(members, coding)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB, f"{peak / MIB:.0f} MiB for a block of 32 positions"


NONE = [b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b" " * (1 << 25)]


@pytest.mark.parametrize("payload", NONE, ids=range(len(NONE)))
def test_a_header_that_is_none_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="^json: "):
        Header.parse(payload)


@pytest.mark.parametrize("member", ["tokens.zst", "entries.zst", "log_probs.zst", "samples.zst"])
def test_a_bomb_is_refused_before_it_is_opened(member: str) -> None:
    """A gigabyte of zeros in a few kilobytes, whether the header tells or hides its size."""
    members, coding = _block()
    members[member] = _bomb(1 << 30)
    told = _header(members, _sizes(member, lambda sizes: [1 << 30, *[0] * (len(sizes) - 1)]))
    tracemalloc.start()
    for each in (members, told):
        with pytest.raises(ValueError, match=f"^(json|{member}): "):
            decode_block(each, coding)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB


def test_a_frame_that_holds_more_than_it_declares_is_refused() -> None:
    honest = compress([np.zeros(1000, np.uint8)])
    lying = bytearray(honest)
    at = honest.index((1000 - 256).to_bytes(2, "little"), 4)
    lying[at : at + 2] = (700 - 256).to_bytes(2, "little")
    assert zstandard.get_frame_parameters(bytes(lying)).content_size == 700
    with pytest.raises(ValueError, match="zstd frame|declares"):
        decompress(bytes(lying), [700])


def test_an_empty_frame_is_looked_at_too() -> None:
    empty = compress([np.zeros(0, np.uint8)])
    assert [len(plane) for plane in decompress(empty, [0])] == [0]
    for damaged in (empty + b"x", empty[:-1], empty + bytes(100), empty + empty, empty[:-1] + bytes([empty[-1] ^ 1])):
        with pytest.raises(ValueError, match="empty frame is followed|zstd frame"):
            decompress(damaged, [0])


def test_a_frame_without_a_size_is_refused() -> None:
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = stream.compress(bytes(100)) + stream.flush()
    with pytest.raises(ValueError, match="holds .* bytes; the header's planes have 100"):
        decompress(frame, [100])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_largest_block_that_a_header_may_declare_stays_bounded(fraction: float) -> None:
    """Few bytes, many places: one row of 65,535 entries beside rows without any."""
    positions = int(MAX_ENTRIES_A_BLOCK // 65535 * fraction)
    counts = np.zeros(positions, "<u2")
    counts[0] = 65535
    low, high = counts.view(np.uint8).reshape(-1, 2).T
    planes = {
        "tokens.zst": [np.zeros(positions + 1, np.uint8)] * 3 + [np.zeros((positions + 7) // 8, np.uint8)],
        "entries.zst": [low, high, *_gaps(65535)],
        "log_probs.zst": [np.zeros(size, np.uint8) for size in (positions, 65535, *[positions] * 4)],
    }  # fmt: skip
    header = {
        "audit": {}, "entries": 65535, "first": 0, "planes": {n: [len(p) for p in ps] for n, ps in planes.items()},
        "records": [["doc", 0, positions]], "samples": 0,
    }  # fmt: skip
    members = {"json": json.dumps(header).encode(), **{name: compress(of) for name, of in planes.items()}}
    _, coding = make(Case(0, 70_000, (3,), Selection(top_k=65535), "standard", 1.0))
    assert sum(map(len, members.values())) < 1000
    tracemalloc.start()
    with pytest.raises(ValueError, match="log_probs.zst: "):
        decode_block(members, coding)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1100 * MIB


def _gaps(entries: int) -> list[np.ndarray]:
    edges = [entries * i // 4 for i in range(5)]
    none = [np.zeros(0, np.uint8)] * 3
    return [plane for a, b in itertools.pairwise(edges) for plane in (np.zeros(b - a, np.uint8), *none)]


def test_a_member_too_many_or_too_few_is_refused() -> None:
    members, coding = _block()
    for changed in ({**members, "more": b""}, {n: p for n, p in members.items() if n != "samples.zst"}):
        with pytest.raises(ValueError, match="has members"):
            decode_block(changed, coding)


def test_ranks_that_come_round_again_are_refused() -> None:
    """Gaps whose sum is beyond an int32 would be small ranks again."""
    K, largest = 2000, (1 << 22) - 1
    rows = Ragged.from_counts(np.array([K]), K)
    size = K // 4
    aside = [np.full(size, 255, np.uint8), np.full(size, 255, np.uint8), np.full(size, 0x3F, np.uint8)]
    planes = [plane for _ in range(4) for plane in (np.full(size, 255, np.uint8), *aside)]
    with pytest.raises(ValueError, match="beyond 4194303"):
        decode_ranks(planes, rows, largest)
