"""Ways in which a cache comes to harm: each takes its files and gives changed ones (None: the file is gone)."""

import hashlib
import itertools
import json
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zstandard

from data.cache.indexes.shard_index import HEAD, ShardIndex, index_name
from data.cache.tar import END_OF_TAR, Member, encode_member, padded_size, read_members

Files = dict[str, bytes]
Changed = dict[str, bytes | None]
Rng = np.random.Generator
Kind = Callable[[Rng, "Cache"], Changed]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, float("nan"), float("inf"), 10**18, -(10**18), 2**63, 2**64, 10**400,
    "", "0", "1", "x" * 10_000, "../../etc/passwd", "/etc/passwd", "\0", "\ud800",
    [], [1], [[]], {}, {"a": 1}, [None] * 3,
]  # fmt: skip


@dataclass
class Cache:
    """A whole one."""

    name: str
    files: Files

    def __post_init__(self) -> None:
        self.manifest: dict[str, Any] = json.loads(self.files["manifest.json"])
        self.shards = [shard["name"] for shard in self.manifest["shards"]]

    def blocks(self, shard: str) -> list[bytes]:
        edges = self.index(shard).offsets.tolist()
        return [self.files[shard][a:b] for a, b in itertools.pairwise(edges)]

    def index(self, shard: str) -> ShardIndex:
        return ShardIndex.parse(self.files[index_name(shard)])


def _one(rng: Rng, of: Any) -> Any:
    return of[int(rng.integers(len(of)))]


def _flipped(rng: Rng, data: bytes, start: int, end: int) -> bytes:
    out, at = bytearray(data), int(rng.integers(start, end))
    out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _members(data: bytes) -> list[Member]:
    return list(read_members(data))


def flip(where: str) -> Kind:
    """A bit of `where`: header, padding, end, or the payload of members with this suffix."""

    def change(rng: Rng, cache: Cache) -> Changed:
        name = _one(rng, cache.shards)
        data = cache.files[name]
        if where == "end":
            return {name: _flipped(rng, data, len(data) - len(END_OF_TAR), len(data))}
        spans = []
        for member in _members(data):
            start, size = member.offset + 512, len(member.payload)
            if where == "header":
                spans.append((start - 512, start))
            elif where == "padding" and padded_size(size) > size:
                spans.append((start + size, start + padded_size(size)))
            elif member.name.partition(".")[2] == where:
                spans.append((start, start + size))
        return {name: _flipped(rng, data, *_one(rng, spans))} if spans else {}

    return change


def flip_tables(rng: Rng, cache: Cache) -> Changed:
    data = cache.files["tables.tar"]
    return {"tables.tar": _flipped(rng, data, 0, len(data))}


def flip_index(rng: Rng, cache: Cache) -> Changed:
    name = index_name(_one(rng, cache.shards))
    data = cache.files[name]
    return {name: data[: int(rng.integers(len(data)))] if rng.random() < 0.3 else _flipped(rng, data, 0, len(data))}


def truncate(where: str) -> Kind:
    def change(rng: Rng, cache: Cache) -> Changed:
        name = _one(rng, [*cache.shards, "tables.tar"])
        data = cache.files[name]
        borders = [m.offset for m in _members(data)] + [m.offset + 512 for m in _members(data)] + [len(data) - 512]
        return {name: data[: int(rng.integers(len(data))) if where == "random" else _one(rng, borders)]}

    return change


def append(rng: Rng, cache: Cache) -> Changed:
    name = _one(rng, [*cache.shards, "tables.tar"])
    data = cache.files[name]
    return {name: data + _one(rng, [rng.bytes(int(rng.integers(1, 2000))), bytes(int(rng.integers(1, 2000))), data])}


def zero_run(rng: Rng, cache: Cache) -> Changed:
    name = _one(rng, [*cache.shards, "tables.tar"])
    data, size = cache.files[name], int(rng.integers(1, 1500))
    at = int(rng.integers(len(data)))
    return {name: (data[:at] + bytes(size) + data[at + size :])[: len(data)]}


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    return b"".join(encode_member(*member) for member in members) + END_OF_TAR


def members(how: str) -> Kind:
    """Whole members swapped, missing, doubled, renamed, or their payloads exchanged; the tar is sound."""

    def change(rng: Rng, cache: Cache) -> Changed:
        name = _one(rng, cache.shards)
        found = [(member.name, member.payload) for member in _members(cache.files[name])]
        a, b = (int(i) for i in rng.choice(len(found), 2, replace=False))
        if how == "swapped":
            found[a], found[b] = found[b], found[a]
        elif how == "exchanged":
            same = [i for i in range(len(found)) if i != a and found[i][0][8:] == found[a][0][8:]]
            b = _one(rng, same) if same else b
            found[a], found[b] = (found[a][0], found[b][1]), (found[b][0], found[a][1])
        elif how == "missing":
            del found[a]
        elif how == "doubled":
            found.insert(b, found[a])
        else:
            found[a] = (
                _one(rng, ["x.json", found[b][0], "00000099" + found[a][0][8:], found[a][0].upper()]),
                found[a][1],
            )
        return {name: _tar(found)}

    return change


def blocks(how: str) -> Kind:
    def change(rng: Rng, cache: Cache) -> Changed:
        first, second = (_one(rng, cache.shards) for _ in range(2))
        parts = {name: cache.blocks(name) for name in (first, second)}
        a, b = int(rng.integers(len(parts[first]))), int(rng.integers(len(parts[second])))
        if how == "swapped":
            parts[first][a], parts[second][b] = parts[second][b], parts[first][a]
        elif how == "missing":
            del parts[first][a]
        else:
            parts[first].insert(a, parts[second][b])
        return {name: b"".join(of) + END_OF_TAR for name, of in parts.items()}

    return change


def shards(how: str) -> Kind:
    def change(rng: Rng, cache: Cache) -> Changed:
        a, b = (_one(rng, cache.shards) for _ in range(2))
        if how == "swapped":
            return {a: cache.files[b], b: cache.files[a]}
        if how == "missing":
            return {_one(rng, [a, "tables.tar"]): None}
        if how == "renamed":
            return {a: None, "shard-000077.tar": cache.files[a]}
        return {_one(rng, [b, "shard-000077.tar"]): cache.files[a]}

    return change


def _spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for name, each in inner for spot in _spots(each, (*path, name)))]


def confused(rng: Rng, value: Any, within: tuple[Any, ...] = ()) -> Any:
    """JSON with one value of another type, missing, doubled, or a number a little off."""
    out = json.loads(json.dumps(value))
    spots = [spot for spot in _spots(out) if len(spot) > len(within) and spot[: len(within)] == within]
    *outer, last = _one(rng, spots)
    holder = out
    for name in outer:
        holder = holder[name]
    how = int(rng.integers(4))
    if how == 0:
        del holder[last]
    elif how == 1 and isinstance(holder, list):
        holder.append(holder[last])
    elif how == 2 and type(holder[last]) is int:
        holder[last] += int(rng.integers(-3, 4))
    else:
        holder[last] = _one(rng, VALUES)
    return out


def manifest_values(rng: Rng, cache: Cache) -> Changed:
    return {"manifest.json": json.dumps(confused(rng, cache.manifest)).encode()}


def manifest_bytes(rng: Rng, cache: Cache) -> Changed:
    data = cache.files["manifest.json"]
    if rng.random() < 0.3:
        return {"manifest.json": data[: int(rng.integers(len(data)))]}
    return {"manifest.json": _flipped(rng, data, 0, len(data))}


def rehashed(cache: Cache, name: str, parts: list[bytes]) -> Changed:
    """A shard of these blocks, and a manifest whose hashes are right again: what an enemy would write."""
    data, value = b"".join(parts) + END_OF_TAR, json.loads(cache.files["manifest.json"])
    shard = next(each for each in value["shards"] if each["name"] == name)
    shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    index = replace(
        cache.index(name), shard_bytes=len(data), shard_sha256=shard["sha256"],
        digests=np.frombuffer(digests, np.uint8).reshape(-1, 32), block_bytes=np.array([len(part) for part in parts]),
    ).to_bytes()  # fmt: skip
    shard["index"] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    return {name: data, index_name(name): index, "manifest.json": json.dumps(value).encode()}


def hostile_index(rng: Rng, cache: Cache) -> Changed:
    """An index made to harm, under hashes that are right: a number of its head, a bit, or a bomb as its frame."""
    name, value = _one(rng, cache.shards), json.loads(cache.files["manifest.json"])
    data = bytearray(cache.files[index_name(name)])
    how = int(rng.integers(4))
    if how == 0:
        at = 8 * int(rng.integers(1, HEAD.size // 8))
        data[at : at + 8] = _one(rng, [rng.bytes(8), bytes(8), b"\xff" * 8, b"\0\0\0\x10\0\0\0\0"])
    elif how == 1:
        data = bytearray(_flipped(rng, bytes(data), 0, len(data)))
    elif how == 2:
        data = data[: int(rng.integers(len(data)))]
    else:
        data[HEAD.size + 32 * len(cache.index(name)) :] = BOMB
    shard = next(each for each in value["shards"] if each["name"] == name)
    shard["index"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if how == 0 and rng.random() < 0.7:  # the manifest agrees with a head that lies
        shard["blocks"], shard["records"], shard["positions"] = struct.unpack_from("<QQQ", data, 48)
    return {index_name(name): bytes(data), "manifest.json": json.dumps(value).encode()}


def _raw(own: str, payload: bytes, changes: dict[str, Any]) -> bytes:
    info = tarfile.TarInfo(own)
    info.size = len(payload)
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(padded_size(len(payload)) - len(payload))


def _bomb(size: int) -> bytes:
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    return b"".join([*(stream.compress(bytes(1 << 20)) for _ in range(size >> 20)), stream.flush()])


BOMB = _bomb(1 << 30)
HEADERS: list[dict[str, Any]] = [
    {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, {"type": tarfile.LNKTYPE, "linkname": "../x"},
    {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, {"type": tarfile.DIRTYPE}, {"type": tarfile.FIFOTYPE},
    {"type": tarfile.GNUTYPE_SPARSE}, {"type": tarfile.XHDTYPE}, {"type": tarfile.GNUTYPE_LONGNAME},
    {"name": "../../escaped.json"}, {"name": "/escaped.json"}, {"name": "a/b.json"}, {"size": 1 << 40},
    {"size": 8**11 - 1},    {"size": 1 << 62}, {"name": "x.json|id"}, {"name": "pipe:id"},
]  # fmt: skip


def hostile(how: str) -> Kind:
    """One block made to harm, under hashes that are right."""

    def change(rng: Rng, cache: Cache) -> Changed:
        name = _one(rng, cache.shards)
        parts = cache.blocks(name)
        at = int(rng.integers(len(parts)))
        found = [(member.name, member.payload) for member in _members(parts[at])]
        which = int(rng.integers(len(found)))
        if how == "json":
            found[0] = (found[0][0], json.dumps(confused(rng, json.loads(found[0][1]))).encode())
        elif how == "payload":
            found[which] = (found[which][0], _flipped(rng, found[which][1], 0, len(found[which][1])))
        elif how == "bomb":
            which = int(rng.integers(1, len(found)))
            found[which], header = (found[which][0], BOMB), json.loads(found[0][1])
            if rng.random() < 0.7:
                sizes = header["planes"][found[which][0].partition(".")[2]]
                sizes[int(rng.integers(len(sizes)))] = (1 << 30) - int(rng.integers(2)) * sum(sizes)
                found[0] = (found[0][0], json.dumps(header).encode())
        raw = [encode_member(*member) for member in found]
        if how == "tar":
            raw[which] = _raw(*found[which], _one(rng, HEADERS))
        return rehashed(cache, name, [*parts[:at], b"".join(raw), *parts[at + 1 :]])

    return change


def hostile_tables(rng: Rng, cache: Cache) -> Changed:
    found = [(member.name, member.payload) for member in _members(cache.files["tables.tar"])]
    which = int(rng.integers(len(found)))
    payload = found[which][1]
    if found[which][0] == "tables.json":
        payload = json.dumps(confused(rng, json.loads(payload))).encode()
    else:
        payload = BOMB if rng.random() < 0.2 else _flipped(rng, payload, 0, len(payload))
    found[which] = (found[which][0], payload)
    data, value = _tar(found), json.loads(cache.files["manifest.json"])
    value["tables"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"tables.tar": data, "manifest.json": json.dumps(value).encode()}


FLIPS = ["header", "padding", "end", "json", "tokens.zst", "entries.zst", "log_probs.zst", "samples.zst"]
ACCIDENTS: dict[str, Kind] = {
    **{f"bit flipped: {'payload of ' * (i > 2)}{where}": flip(where) for i, where in enumerate(FLIPS)},
    "bit flipped: tables": flip_tables,
    "bit flipped or cut off: an index": flip_index,
    "truncated anywhere": truncate("random"),
    "truncated at a member's border": truncate("border"),
    "bytes appended": append,
    "run of zeros": zero_run,
    **{f"member {how}": members(how) for how in ("swapped", "exchanged", "missing", "doubled", "renamed")},
    **{f"block {how}": blocks(how) for how in ("swapped", "missing", "doubled")},
    **{f"shard {how}": shards(how) for how in ("swapped", "missing", "renamed", "doubled")},
    "manifest: a value": manifest_values,
    "manifest: its bytes": manifest_bytes,
}
ATTACKS: dict[str, Kind] = {
    **{f"hostile {how}, hashes right": hostile(how) for how in ("json", "payload", "bomb", "tar")},
    "hostile tables, hashes right": hostile_tables,
    "hostile index, hashes right": hostile_index,
}
