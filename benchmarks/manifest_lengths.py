"""How long do the manifest and the lengths of all records of a large cache take to load, and how much memory?

Command:  python -m benchmarks.manifest_lengths [shards] [records a shard]
Writes a manifest and the indexes of a cache without its shards, by default 10,000 shards of 20,000 records (2·10⁸
records, 10¹¹ positions), and loads them in a fresh process. Beside it, a cache of 1/100 of the shards as version 3
listed it in its manifest, and the same in version 4. Prints a table. It needs about 100 bytes of disk a block.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.cache.indexes.shard_index import ShardIndex
from data.cache.manifest import Audit, Manifest, Shard, read_manifest
from data.cache.selection import Selection
from data.cache.totals import Totals
from data.cache.writer import write_index
from data.storage.storage import storage_at

RECORDS_A_BLOCK, ROW_LENGTH, BYTES_A_POSITION = 16, 512, 96
MIB = 1 << 20


def made_up_index(records: int, random: np.random.Generator) -> ShardIndex:
    """An index of records of 512 positions, one in four of them shorter, as ends of documents are."""
    lengths = np.where(random.random(records) < 0.75, ROW_LENGTH, random.integers(32, ROW_LENGTH, records))
    counts = np.diff([*range(0, records, RECORDS_A_BLOCK), records])
    sizes = np.add.reduceat(lengths, np.cumsum(counts) - counts) * BYTES_A_POSITION + random.integers(
        0, 512, len(counts)
    )
    digests = np.frombuffer(random.bytes(32 * len(counts)), np.uint8).reshape(-1, 32)
    totals = Totals(positions=int(lengths.sum()))
    size, sha256, windows_sha256 = int(sizes.sum()) + 1024, "0" * 64, random.bytes(32).hex()
    return ShardIndex(size, sha256, totals, windows_sha256, digests, sizes, counts, lengths.astype(np.int32))


def write(folder: Path, shards: int, records: int) -> list[ShardIndex]:
    """A manifest and indexes; returns the first hundred of these."""
    random, storage, listed, kept = np.random.default_rng(0), storage_at(folder), list[Shard](), list[ShardIndex]()
    for number in range(shards):
        index = made_up_index(records, random)
        listed.append(write_index(storage, f"shard-{number:06d}.tar", index))
        kept += [index] if number < 100 else []
    statistics = dict.fromkeys(("teacher_nll", "teacher_mass", "entries", "scored"), 1.0)
    facts = {"bytes": 1, "sha256": "0" * 64}
    manifest = Manifest(
        50_000, "none", {}, Selection(), ROW_LENGTH, "standard", Audit(0, 0, 0), statistics, facts, ({},), tuple(listed)
    )
    manifest.write(storage)
    return kept


def write_earlier(folder: Path, indexes: list[ShardIndex]) -> None:
    """The manifest of the same shards as version 3 wrote it."""
    value = json.loads((folder / "manifest.json").read_text())
    value["version"], value["shards"] = 3, [
        {
            "name": f"shard-{number:06d}.tar", "bytes": index.shard_bytes, "sha256": index.shard_sha256,
            "blocks": [{"bytes": b.bytes, "sha256": b.sha256, "lengths": list(b.lengths)} for b in index.blocks],
        }
        for number, index in enumerate(indexes)
    ]  # fmt: skip
    target = folder / "earlier"
    target.mkdir()
    (target / "manifest.json").write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def peak_mib() -> float:
    """The most memory that this process has had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(folder: Path) -> dict[str, float]:
    """Loads a cache. Memory is what the process has more at its peak than before."""
    before, started, cpu = peak_mib(), time.perf_counter(), time.process_time()
    manifest = read_manifest(folder)
    read = time.perf_counter()
    lengths = manifest.lengths
    loaded, cpu, mib = time.perf_counter(), time.process_time() - cpu, peak_mib() - before
    return {
        "records": len(lengths.records), "positions": int(lengths.records.sum(dtype=np.int64)),
        "sha256": int(hashlib.sha256(lengths.records).hexdigest()[:8], 16),
        "manifest_bytes": (folder / "manifest.json").stat().st_size,
        "index_bytes": sum(path.stat().st_size for path in folder.glob("*.index")),
        "manifest_seconds": read - started, "lengths_seconds": loaded - read, "mib": mib,
        "cpu_seconds": cpu,
        "array_mib": sum(array.nbytes for array in asdict(lengths).values()) / MIB,
    }  # fmt: skip


def measured(folder: Path) -> dict[str, float]:
    """The same in a process of its own."""
    done = subprocess.run([sys.executable, "-m", __spec__.name, "measure", folder], capture_output=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    shards, records = (int(sys.argv[i]) if len(sys.argv) > i else n for i, n in ((1, 10_000), (2, 20_000)))
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        indexes = write(small, min(100, max(1, shards // 100)), records)
        write_earlier(small, indexes)
        write(large, shards, records)
        rows = {
            "version 3, 1/100": measured(small / "earlier"), "version 4, 1/100": measured(small),
            "version 4": measured(large),
        }  # fmt: skip
    print("| cache | records | positions | manifest | indexes | manifest read | lengths read | CPU | memory | arrays |")
    print("|---" * 10 + "|")
    for name, r in rows.items():
        print(
            f"| {name} | {r['records']:,} | {r['positions']:.2e} | {r['manifest_bytes'] / 1e6:.1f} MB | "
            f"{r['index_bytes'] / 1e6:.1f} MB | {r['manifest_seconds']:.2f} s | {r['lengths_seconds']:.2f} s | "
            f"{r['cpu_seconds']:.2f} s | "
            f"{r['mib']:.0f} MiB | {r['array_mib']:.0f} MiB |"
        )
    earlier, now = rows["version 3, 1/100"], rows["version 4, 1/100"]
    assert earlier["sha256"] == now["sha256"], "both read the same lengths"
    print(f"\nversion 3 over version 4: {earlier['cpu_seconds'] / now['cpu_seconds']:.1f} times the CPU, "
          f"{earlier['mib'] / max(1, now['mib']):.1f} times the memory")  # fmt: skip


if __name__ == "__main__":
    main()
