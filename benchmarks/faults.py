"""Does any fault of a cache pass unseen, and does any cache made to do harm do any?

Command:  python -m benchmarks.faults [mutations] [seed]
Makes tiny caches of every kind, harms a copy in every way of fault_kinds.py, and reads it twice: as training does, and
by verify. An accident must be refused by one of them with a UsageError that names the file; an attack (its hashes are
right) must be refused or read, without any other exception, a child process, a file written, more than MEMORY bytes
or SECONDS. Prints a table, and every case that failed; status 1 if there is one.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fault_kinds import ACCIDENTS, ATTACKS, Cache, Changed
from data.cache.inspection.verify import verify
from data.cache.manifest import read_manifest
from data.stream.shards import ShardReader
from kd_core.errors import UsageError
from tests.data.cache.kinds import KINDS
from tests.tiny import Tiny, make_corpus, make_teacher, write_caches

MEMORY, SECONDS = 1 << 30, 5.0
FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "exec"),
    *("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "socket.connect", "ctypes.dlopen"),
}


class Watch:
    """Notes what no reader of a cache has to do."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or writes:
            self.seen.append(event)


def limit_memory() -> None:
    """At most MEMORY bytes more than now, for this process."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _meaning(data: bytes) -> Any:
    """A manifest without what it says of the teacher's name, numbers of figures rounded; None where it is no JSON."""
    try:
        value = json.loads(data, parse_float=lambda text: float(text) + 0.0)  # no −0
        for name in ("statistics", "audit"):
            value[name] = {key: f"{each:.5g}" if type(each) is float else each for key, each in value[name].items()}
        value["teacher"] = value["teacher"].get("dtype")  # all else that is said of it is free
        value["made"] = isinstance(value.get("made", {}), dict)  # as is who made it
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return None


def _invisible(cache: Cache, changed: Changed) -> bool:
    if all(cache.files.get(name) == data for name, data in changed.items()):
        return True
    if set(changed) != {"manifest.json"}:
        return False
    return _meaning(changed["manifest.json"] or b"") == _meaning(cache.files["manifest.json"])


def _read(folder: Path) -> str | None:
    """As training does; the message where it is refused."""
    try:
        for _ in ShardReader(folder, read_manifest(folder)).records():
            pass
    except UsageError as error:
        return str(error)
    return None


def _verified(folder: Path) -> str | None:
    try:
        return "\n".join(verify(folder, lambda _: None).problems) or None
    except UsageError as error:
        return str(error)


class Harness:
    """Runs cases, and counts what became of each."""

    def __init__(self, folder: Path, caches: Sequence[Cache]) -> None:
        self.folder, self.caches, self.watch = folder, caches, Watch()
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in (*ACCIDENTS, *ATTACKS)}
        self.failed: list[str] = []
        for cache in caches:
            (folder / cache.name).mkdir()
            self._put(cache, dict(cache.files))
            assert _read(folder / cache.name) is None
            assert _verified(folder / cache.name) is None
            self._put(cache, {"manifest.json": b"{"})  # what errors import is imported now
            _read(folder / cache.name)
            self._put(cache, dict(cache.files))

    def _put(self, cache: Cache, changed: Changed) -> None:
        for name, data in changed.items():
            path = self.folder / cache.name / name
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(data)

    def run(self, kind: str, seed: Sequence[int]) -> None:
        """One case."""
        rng, count = np.random.default_rng(seed), self.counts[kind]
        cache = self.caches[int(rng.integers(len(self.caches)))]
        changed = {**ACCIDENTS, **ATTACKS}[kind](rng, cache)
        if _invisible(cache, changed):
            count["no change"] += 1
            return
        self._put(cache, changed)
        count["tried"] += 1
        problem = self._judge(kind, cache, changed)
        if problem:
            count[problem.partition(":")[0]] += 1
            self.failed.append(f"{kind}, {cache.name}, seed {list(seed)}: {problem}")
        self._put(cache, {name: cache.files.get(name) for name in changed})

    def _judge(self, kind: str, cache: Cache, changed: Changed) -> str | None:
        folder, count, started = self.folder / cache.name, self.counts[kind], time.perf_counter()
        self.watch.seen, self.watch.on = [], True
        try:
            read, verified = _read(folder), _verified(folder)
        except BaseException as error:  # anything else than a refusal is what is looked for
            return f"crashed: {type(error).__name__}: {error}"[:300]
        finally:
            self.watch.on = False
        count["by reading"] += read is not None
        count["by verify"] += verified is not None
        if self.watch.seen:
            return f"code: {self.watch.seen}"
        if time.perf_counter() - started > SECONDS:
            return f"slow: {time.perf_counter() - started:.1f} s"
        if any(word in f"{read}{verified}" for word in ("Unable to allocate", "MemoryError", "block 0: . ")):
            return f"crashed: out of memory: {read} {verified}"[:300]
        message = read or verified
        if message is None:
            return None if kind in ATTACKS else "undetected: nobody complained"
        names = [*changed, *ALSO] if "manifest.json" in changed else list(changed)
        return None if any(name in message for name in names) else f"unnamed: {message[:200]}"


ALSO = (
    ".tar",
    ".index",
    "plan.json",
)  # a manifest that lies is found where it differs from a shard, the tables or the plan
COLUMNS = ("tried", "by reading", "by verify", "undetected", "unnamed", "crashed", "slow", "code", "no change")


def table(counts: dict[str, Counter[str]]) -> list[str]:
    """A row a kind, and the sums."""
    lines = ["| fault | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    total: Counter[str] = Counter()
    for kind, count in counts.items():
        total += count
        lines.append(f"| {kind} | " + " | ".join(str(count[name]) for name in COLUMNS) + " |")
    return [*lines, "| all | " + " | ".join(f"**{total[name]}**" for name in COLUMNS) + " |"]


def make_caches(root: Path) -> list[Cache]:
    """A small one of every kind, as files in memory."""
    tiny, caches = Tiny(root), []
    make_corpus(tiny.corpus, 8)
    make_teacher(tiny.teacher, [path.read_text() for path in sorted(tiny.corpus.iterdir())])
    for number, (selection, codec) in enumerate(KINDS.values()):
        out = root / f"kind{number}"
        small = {"block_positions": 40, "shard_bytes": 90 * 16}
        write_caches(tiny.export(selection=selection, codec=codec, **small), out)
        caches.append(Cache(f"kind{number}", {path.name: path.read_bytes() for path in (out / "train").iterdir()}))
    return caches


def run_all(caches: Sequence[Cache], mutations: int, seed: int) -> Harness:
    """So many cases, the kinds in turn."""
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), caches)
        kinds = [*ACCIDENTS, *ATTACKS]
        tried = 0
        while sum(count["tried"] for count in harness.counts.values()) < mutations:
            harness.run(kinds[tried % len(kinds)], (seed, tried))
            tried += 1
    return harness


def main() -> None:
    mutations, seed = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 20_000), (2, 0)))
    with tempfile.TemporaryDirectory() as folder:
        caches = make_caches(Path(folder))
    if (child := os.fork()) == 0:  # the limit is the child's alone
        limit_memory()
        try:
            started = time.perf_counter()
            harness = run_all(caches, mutations, seed)
            print(f"{len(caches)} kinds of caches, seed {seed}, {time.perf_counter() - started:.0f} s\n")
            print("\n".join([*table(harness.counts), "", *harness.failed[:50]]), flush=True)
            os._exit(bool(harness.failed))
        finally:
            os._exit(1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
