"""A second reader of caches, written from data/README.md alone, with tarfile, zstandard and numpy: nothing of ours.

It checks hashes and is slow and plain on purpose: where it and `data/cache` differ, one of them or the document lies.
"""

import hashlib
import io
import itertools
import json
import math
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

Planes = list[np.ndarray]


def check_hash(data: bytes, wanted: str) -> bytes:
    assert hashlib.sha256(data).hexdigest() == wanted, "not the bytes that the manifest speaks of"
    return data


def tar_members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def width(largest: int) -> int:
    return max(1, math.ceil(largest.bit_length() / 8))


def number(planes: Planes) -> np.ndarray:
    return sum(plane.astype(np.int64) << 8 * place for place, plane in enumerate(planes))


def unzip(frame: bytes, sizes: list[int]) -> Planes:
    data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=sum(sizes))
    assert len(data) == sum(sizes)
    ends = np.cumsum([0, *sizes])
    return [np.frombuffer(data[a:b], np.uint8) for a, b in itertools.pairwise(ends)]


def fixed(planes: Planes) -> np.ndarray:
    code = number(planes)
    return np.where(code == 65535, -np.inf, 16 - code / 256).astype(np.float32)


def floats(planes: Planes) -> np.ndarray:
    return number(planes).astype(np.uint32).view(np.float32)


def levels(step: float) -> np.ndarray:
    roots = [step * j for j in range(3, math.ceil(0.45 / step))]
    coarse = [roots[-1] + i * 3 * step for i in range(1, math.ceil(1 / step))]
    upper = [2 * math.log(root) for root in [*roots, *(root for root in coarse if root < 1), 1.0]]
    gap = upper[1] - upper[0]
    below = [upper[0] - i * gap for i in range(1, 1000) if upper[0] - i * gap > -30]
    return np.array([*reversed(below), *upper]).astype(np.float32)


class Tables:
    def __init__(self, members: dict[str, bytes]) -> None:
        header = json.loads(members["tables.json"])
        self.V, self.C = header["vocab_size"], header["candidates"]

        def read(name: str, size: int) -> list[int]:
            return number(unzip(members[name], [size] * width(self.V))).tolist()

        written = read("global.zst", header["global"])
        self.ids = [*written, *sorted(set(range(self.V)) - set(written))]
        self.rank = {token: rank for rank, token in enumerate(self.ids)}
        flat = read("lists.zst", header["tokens"] * self.C)
        tokens = read("tokens.zst", header["tokens"])
        self.lists = {t: [self.ids[r] for r in flat[i * self.C :][: self.C]] for i, t in enumerate(tokens)}

    def token(self, before: int, rank: int) -> int:
        if rank >= self.C:
            return self.ids[rank - self.C]
        return self.lists[before][rank] if before in self.lists else self.ids[rank]

    def row_order(self, tokens: list[int]) -> list[int]:
        return sorted(range(len(tokens)), key=lambda at: min(self.rank[tokens[at]], 65535))


def read_ids(planes: Planes, tokens: list[int], tables: Tables) -> list[list[int]]:
    counts = number(planes[:2]).tolist()
    K, order, largest = max(counts), tables.row_order(tokens), tables.C + tables.V - 1
    gaps = [[0] * count for count in counts]
    rest = iter(planes[2:])
    edges = [K * i // 4 for i in range(5)]
    for start, end in itertools.pairwise(edges):
        if start == end:
            continue
        low = iter(next(rest).tolist())
        aside = iter(number([next(rest) for _ in range(width(largest))]).tolist())
        for row in order:
            for column in range(start, min(end, counts[row])):
                gap = next(low)
                gaps[row][column] = next(aside) if gap == 255 else gap
        assert not [*low, *aside]
    assert not list(rest)
    return [
        [tables.token(token, rank) for rank in (np.cumsum(row) + np.arange(len(row))).tolist()]
        for token, row in zip(tokens, gaps, strict=True)
    ]


def square(rows: list[list[float]], filler: float, kind: type) -> np.ndarray:
    widest = max(map(len, rows), default=0)
    return np.array([[*row, *[filler] * (widest - len(row))] for row in rows], kind).reshape(len(rows), widest)


def read_lossless(planes: Planes, ids: list[list[int]]) -> dict[str, Any]:
    flat, tail, labels, *tempered = (floats(planes[i : i + 4]) for i in range(0, len(planes), 4))
    values = iter(flat.tolist())
    head = square([[next(values) for _ in row] for row in ids], -np.inf, np.float32)
    return {"head": head, "tail": tail, "labels": labels, "tempered": tempered}


def read_levels(planes: Planes, ids: list[list[int]], labels: list[int], step: float) -> dict[str, Any]:
    classes, flat, *rest = planes
    tail, outside, *tempered = (fixed(rest[i : i + 2]) for i in range(0, len(rest), 2))
    counts = [len(row) for row in ids]
    keys = counts if len(set(counts)) > 1 else classes.tolist()
    codes: list[list[int]] = [[]] * len(ids)
    values = iter(flat.tolist())
    for row in sorted(range(len(ids)), key=lambda at: keys[at]):
        codes[row] = [next(values) for _ in range(counts[row])]
    table = levels(step)
    probs = np.exp(table.astype(np.float64)).astype(np.float32)
    head = square([[table[code] for code in row] for row in codes], -np.inf, np.float32)
    total = square([[probs[code] for code in row] for row in codes], 0, np.float32).sum(axis=1) + np.exp(tail)
    shift = np.log(total)
    head, tail = head - shift[:, None], tail - shift
    own = iter(outside.tolist())
    label_logs = [
        head[at, row.index(label)] if label in row else next(own)
        for at, (row, label) in enumerate(zip(ids, labels, strict=True))
    ]
    assert not list(own)
    return {"head": head, "tail": tail, "labels": np.array(label_logs, np.float32), "tempered": tempered}


def read_samples(planes: Planes, tokens: list[int], tail: np.ndarray, selection: dict, tables: Tables) -> tuple:
    draws, plain = selection["draws"], selection["proposal_temperature"] == 1
    last = width(draws) if plain else 2
    ids = read_ids(planes[:-last], tokens, tables)
    flat = number(planes[-last:]) if plain else fixed(planes[-last:])
    if plain:
        of_times = np.array([-np.inf, *(math.log(m / draws) for m in range(1, draws + 1))]).astype(np.float32)
        flat = of_times[flat]
    values = iter(flat.tolist())
    weights = square([[next(values) for _ in row] for row in ids], -np.inf, np.float32)
    return square(ids, 0, np.int64), weights + tail[:, None] if plain else weights


def read_block(members: dict[str, bytes], manifest: dict, tables: Tables) -> Iterator[dict[str, Any]]:
    members = {name.partition(".")[2]: payload for name, payload in members.items()}
    header, selection = json.loads(members.pop("json")), manifest["selection"]
    planes = {name: unzip(frame, header["planes"][name]) for name, frame in members.items()}
    *token_planes, masks = planes["tokens.zst"]
    every = [tables.ids[rank] for rank in number(token_planes).tolist()]
    lengths = [positions for _, _, positions in header["records"]]
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    windows = [every[a:b] for a, b in itertools.pairwise(starts)]
    tokens = [token for window in windows for token in window[:-1]]
    labels = [token for window in windows for token in window[1:]]
    ids = read_ids(planes["entries.zst"], tokens, tables) if selection["top_k"] else [[] for _ in tokens]
    if manifest["codec"] == "lossless":
        found = read_lossless(planes["log_probs.zst"], ids)
    else:
        step = {"standard": 0.0037, "compact": 0.0056}[manifest["codec"]]
        found = read_levels(planes["log_probs.zst"], ids, labels, step)
    sampled = (
        read_samples(planes["samples.zst"], tokens, found["tail"], selection, tables) if selection["draws"] else None
    )
    bits, at = np.unpackbits(masks), 0
    for number_, (document, start, positions) in enumerate(header["records"]):
        part = slice(at, at := at + positions)
        tails = zip(selection["tail_temperatures"], found["tempered"], strict=True)
        yield {
            "name": f"{header['first'] + number_:08d}",
            "document": document,
            "start": start,
            "token_ids": windows[number_],
            "loss_mask": bits[part],
            "ids": ids[part],
            "head": found["head"][part],
            "tail": found["tail"][part],
            "labels": found["labels"][part],
            "tempered": {t: tail[part] for t, tail in tails},
            "samples": (sampled[0][part], sampled[1][part]) if sampled else None,
        }


def read_index(data: bytes, shard: dict[str, Any]) -> Iterator[tuple[int, str, list[int]]]:
    """Bytes, sha256 and positions by record of each block."""
    assert data[:8] == b"KDINDEX4"
    size, digest, blocks, records, positions = struct.unpack_from("<Q32sQQQ", data, 8)
    stated = [shard[name] for name in ("bytes", "sha256", "blocks", "records", "positions")]
    assert [size, digest.hex(), blocks, records, positions] == stated
    at, counts = 160 + 32 * blocks, [blocks, blocks, records]
    planes = unzip(data[at:], [count for count in counts for _ in range(4)])
    sizes, numbers, lengths = (number(planes[i : i + 4]).tolist() for i in (0, 4, 8))
    ends = np.cumsum([0, *numbers])
    for block in range(blocks):
        yield sizes[block], data[160 + 32 * block :][:32].hex(), lengths[ends[block] : ends[block + 1]]


def windows_sha256(records: list[dict[str, Any]]) -> str:
    """The sha256 over 16 bytes of each window and 16 of its mask."""
    total = hashlib.sha256()
    for record in records:
        tokens = np.array(record["token_ids"], "<i4").tobytes()
        total.update(hashlib.sha256(f"{record['start']} ".encode() + tokens).digest()[:16])
        total.update(hashlib.sha256(bytes(record["loss_mask"].tolist())).digest()[:16])
    return total.hexdigest()


def read_cache(folder: Path) -> Iterator[dict[str, Any]]:
    """Every record of a cache, in order."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("kd-workspace teacher cache", 4)
    tables = Tables(tar_members(check_hash((folder / "tables.tar").read_bytes(), manifest["tables"]["sha256"])))
    for shard in manifest["shards"]:
        data, at = check_hash((folder / shard["name"]).read_bytes(), shard["sha256"]), 0
        index = check_hash((folder / shard["name"].replace(".tar", ".index")).read_bytes(), shard["index"]["sha256"])
        shard_records: list[dict[str, Any]] = []
        for size, digest, lengths in read_index(index, shard):
            records = list(
                read_block(tar_members(check_hash(data[at:][:size], digest) + bytes(1024)), manifest, tables)
            )
            assert [len(record["token_ids"]) - 1 for record in records] == lengths
            yield from records
            shard_records += records
            at += size
        assert windows_sha256(shard_records) == index[128:160].hex()
