"""Caches as earlier versions wrote them: blocks and lengths in the manifest, and no index files."""

import json
from pathlib import Path
from typing import Any

from tests.reference.cache_reader import read_index


def make_earlier(folder: Path, version: int, **changes: Any) -> bytes:
    """Turns a cache of version 4 into an earlier one with `changes` of its manifest, and returns its text."""
    path = folder / "manifest.json"
    value = {**json.loads(path.read_text()), "version": version, **changes}
    if version == 2:
        del value["made"]
    for number, shard in enumerate(value["shards"]):
        index = folder / shard["name"].replace(".tar", ".index")
        blocks = [
            {"bytes": size, "sha256": digest, "lengths": lengths}
            for size, digest, lengths in read_index(index.read_bytes(), shard)
        ]
        value["shards"][number] = {**{name: shard[name] for name in ("name", "bytes", "sha256")}, "blocks": blocks}
        index.unlink()
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return path.read_bytes()
