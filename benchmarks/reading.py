"""Reading a cache on one core: verified, shuffled, packed, collated, beside what others would keep the same records in.

    OMP_NUM_THREADS=1 python -m benchmarks.reading                            # made-up records
    OMP_NUM_THREADS=1 python -m benchmarks.reading --cache quickstart/cache/train
    OMP_NUM_THREADS=1 python -m benchmarks.reading --profile                  # where our time goes

Every candidate reads one epoch of the same records, opening of files and (ours) tables included, from a warm page
cache: segments permuted, records permuted within a window, packed into rows by our `pack_rows`, collated into batches
by our `Collate`; verified where the format can (a column says by what). One process pinned to one core, no
workers, and no thread that reads ahead, which is for a core that would be idle. Every round runs each candidate once,
in turn; the table shows medians.
KL is KL(original‖read) a position, in nats, over records found equal otherwise. `benchmarks/formats.py` says what
each peer stores.
"""

import argparse
import cProfile
import itertools
import os
import platform
import pstats
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import formats
from benchmarks.cached_records import drawn, from_cache, made_up, repeated, write_cache
from data.cache.columns import Columns, measure_codec_error
from data.cache.record import Record
from data.cache.selection import Selection
from data.stream.collate import Collate
from data.stream.packing import pack_rows
from data.stream.stream import Shards, training_steps
from kd_core.types import Batch

STANDARD = "ours, standard"
WANTED, AIM, TIMES_PEER = 1.2e6, 2.5e6, 2.0
PACKED_POSITIONS = 131_072  # about as many as a window of ours holds
PARTS = (  # of a profile: what, and the functions whose time it is, by file and name
    ("sha256", ("openssl_sha256",)),
    ("files", ("block_reader.py:_bytes",)),
    ("tar: our strict headers", ("read_members",)),
    ("tar: webdataset", ("_sample",)),
    ("header's JSON", ("header.py:parse",)),
    ("zstd", ("planes.py:decompress",)),
    ("tokens and masks", ("_decode_tokens",)),
    ("ids", ("entries.py:decode_entries",)),
    ("log-probs", ("log_probs.py:decode_log_probs",)),
    ("cut", ("record.py:cut",)),
    ("order and packing", ("look_ahead",)),
    ("collate", ("collate.py:__call__",)),
)


@dataclass(frozen=True)
class Candidate:
    """A folder of records and how an epoch of it is read."""

    name: str
    verified: str
    shuffle: str
    folder: Path
    batches: Callable[[int], Iterator[Batch]]
    records: Callable[[], Iterator[Record]]
    original: dict[str, Record]
    before: Callable[[], None] = lambda: None

    @property
    def bytes(self) -> int:
        self.before()
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def _windows(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Runs of a stream of records that are packed together."""
    held, total = list[Record](), 0
    for record in records:
        held.append(record)
        total += record.positions
        if total >= PACKED_POSITIONS:
            yield held
            held, total = [], 0
    if held:
        yield held


def peer_batches(records: Iterator[Record], collate: Collate, micro_batch: int) -> Iterator[Batch]:
    """Batches of a stream of records."""
    rows = (
        [held[i] for i in row]
        for held in _windows(records)
        for row in pack_rows([record.positions for record in held], collate.row_length)
    )
    while some := list(itertools.islice(rows, micro_batch)):
        yield collate(some)


def our_batches(folder: Path, collate: Collate, micro_batch: int, seed: int) -> Iterator[Batch]:
    """Batches as training has them; endless."""
    steps = training_steps(
        Shards(str(folder), prefetch=0), collate, seed=seed, start_row=0, rows_per_step=micro_batch,
        micro_batch=micro_batch, rank=0, ranks=1,
    )  # fmt: skip
    return (batch for step in steps for batch in step)


def epoch(
    candidate: Candidate, positions: int, seed: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, int]:
    """Seconds, and positions read: all but less than a batch's, so that nobody begins another epoch."""
    candidate.before()
    started, read = clock(), 0
    batches = candidate.batches(seed)
    size = 0
    while read + size <= positions:
        documents = next(batches).document_ids
        read, size = read + int((documents >= 0).sum()), documents.numel()
    return clock() - started, read


def ours(records: list[Record], vocab_size: int, args: argparse.Namespace) -> list[Candidate]:
    """Our cache by every kind."""
    random, collate = np.random.default_rng(1), Collate(args.row_length)
    top_k = records[0].topk_token_ids.shape[1]
    kinds: dict[str, tuple[Selection, str, Callable[[Record], Record]]] = {
        STANDARD: (Selection(top_k), "standard", lambda record: record),
        "ours, compact": (Selection(top_k), "compact", lambda record: record),
        "ours, lossless": (Selection(top_k), "lossless", lambda record: record),
        "ours, p ≥ 3e-3": (Selection(top_k, min_prob=3e-3), "standard", lambda record: record.cut(min_prob=3e-3)),
        "ours, 12 draws": (Selection(0, draws=12), "standard", lambda r: drawn(r, 12, vocab_size, random)),
    }
    found: list[Candidate] = []
    for name, (selection, codec, change) in kinds.items():
        if not wanted(args, name):
            continue
        changed, folder = [change(record) for record in records], Path(args.folder) / name.replace(" ", "_")
        if not folder.exists():
            write_cache(folder, changed, vocab_size, selection, codec)
        found.append(
            Candidate(
                name, "sha256 a block", "its own", folder,
                lambda seed, at=folder: our_batches(at, collate, args.micro_batch, seed),
                lambda at=folder: Shards(str(at)).reader().records(),
                {record.name: record for record in changed},
            )
        )  # fmt: skip
    return found


def wanted(args: argparse.Namespace, name: str) -> bool:
    return not args.only or any(part in name for part in args.only)


def _unwritten(each: formats.Format, folder: Path, records: list[Record], ids: type) -> str:
    """Write a format's folder, whole or not at all; why its library cannot, or nothing."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        each.write(partial, records, ids)
    except ImportError as error:
        return str(error)
    partial.rename(folder)
    return ""


def peers(records: list[Record], vocab_size: int, args: argparse.Namespace) -> list[Candidate]:
    """The formats whose library is there; says which are not."""
    ids, collate = np.uint16 if vocab_size <= 1 << 16 else np.uint32, Collate(args.row_length)
    original = {record.name: record for record in records}
    found: list[Candidate] = []
    for each in formats.FORMATS:
        if not wanted(args, each.name):
            continue
        if not each.there:
            print(f"{each.name}: {each.library} is not installed")
            continue
        folder = Path(args.folder) / each.name.replace(" ", "_")
        if not folder.exists() and (why := _unwritten(each, folder, records, ids)):
            print(f"{each.name}: {why}")
            continue
        found.append(
            Candidate(
                each.name, each.verified, each.shuffle, folder,
                lambda seed, e=each, at=folder: peer_batches(e.read(at, seed), collate, args.micro_batch),
                lambda e=each, at=folder: e.read(at, 0),
                original,
                lambda e=each, at=folder: e.before(at),
            )
        )  # fmt: skip
    return found


def error(candidate: Candidate) -> float:
    """KL(original‖read) a position, over the first records.

    Raises:
        ValueError: tokens or ids are others.
    """
    candidate.before()
    stream = candidate.records()
    read = [record for record, _ in zip(stream, range(32), strict=False)]
    original = [candidate.original[record.name] for record in read]
    return measure_codec_error(Columns.from_records(original, ()), Columns.from_records(read, ()))["kl_mean"]


def measure(
    candidates: list[Candidate], positions: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Positions a second, medians over rounds in which each runs once; a first one warms up."""
    seen: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn in range(rounds + 1):
        start = turn * 7 % len(candidates)
        for candidate in candidates[start:] + candidates[:start]:
            seconds, read = epoch(candidate, positions, turn, clock)
            seen[candidate.name] += [read / seconds] if turn else []
    return {name: median(values) for name, values in seen.items()}


def table(candidates: list[Candidate], speeds: dict[str, float], positions: int) -> str:
    fastest = max((speeds[c.name] for c in candidates if not c.name.startswith("ours")), default=None)
    head = ("format", "M positions/s", "/ fastest peer", "bytes a position", "KL", "verified by", "shuffled by")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for each in candidates:
        speed = speeds[each.name]
        cells = [each.name, f"{speed / 1e6:.3f}", f"{speed / fastest:.2f}" if fastest else ""]
        cells += [f"{each.bytes / positions:.1f}", f"{error(each):.1e}", each.verified, each.shuffle]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(speeds: dict[str, float]) -> str:
    """What was wanted of the standard cache, and whether it is reached; none where it did not run."""
    if STANDARD not in speeds:
        return ""
    own, others = speeds[STANDARD], {n: s for n, s in speeds.items() if not n.startswith("ours")}
    lines = [("positions/s", WANTED, own, ""), ("positions/s, aim", AIM, own, "")]
    verified = {n: s for n, s in others.items() if n not in formats.UNVERIFIED}
    compressed = {n: s for n, s in others.items() if "zstd" in n or "deflated" in n}
    groups = {"fastest peer": others, "fastest verified peer": verified, "fastest compressed peer": compressed}
    for words, names in groups.items():
        if names:
            peer = max(names, key=lambda name: names[name])
            lines.append((f"times the {words}", TIMES_PEER, own / names[peer], f"  {peer}"))
    return "\n".join(
        f"{name:33} wanted {least:>12,.3g}  seen {seen:>12,.3g}  {'yes' if seen >= least else 'no'}{of}"
        for name, least, seen, of in lines
    )


def profile(candidate: Candidate, positions: int, clock: Callable[[], float]) -> str:
    """Microseconds a position by part, of one epoch under cProfile in this thread."""
    epoch(candidate, positions, 0, clock)
    profiler = cProfile.Profile(clock)
    profiler.enable()
    seconds, read = epoch(candidate, positions, 1, clock)
    profiler.disable()
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    lines, known = [f"{candidate.name}: {1e6 * seconds / read:.3f} µs a position"], 0.0
    for part, names in PARTS:
        own = sum(values[3] for at, values in stats.items() if any(_is(at, name) for name in names))
        known += own
        lines.append(f"  {part:26}{1e6 * own / read:8.3f}  {own / seconds:6.1%}")
    return "\n".join([*lines, f"  {'the rest':26}{1e6 * (seconds - known) / read:8.3f}  {1 - known / seconds:6.1%}"])


def _is(at: tuple[str, int, str], name: str) -> bool:
    """Whether a function of a profile is this one: `file.py:function`, or a function."""
    file, _, function = name.rpartition(":")
    if file:
        return at[2] == function and Path(at[0]).name == file
    return at[2] == function or (at[0] == "~" and name in at[2])


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="take the records of this cache (a lossless one, best), not made-up ones")
    parser.add_argument("--positions", type=int, default=500_000)
    parser.add_argument("--top-k", type=int, default=64, help="of made-up records")
    parser.add_argument("--vocab", type=int, default=49_152, help="of made-up records")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="candidates whose names hold one of these")
    parser.add_argument("--core", type=int, help="the core to run on; default: the last one")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of CPU: for a core that others use too")
    parser.add_argument("--folder", help="keep what is written here, and take what is there")
    parser.add_argument("--profile", action="store_true", help="where our time goes, instead of the table")
    return parser.parse_args(arguments)


def records_of(args: argparse.Namespace) -> tuple[list[Record], int]:
    """The records, and their vocabulary."""
    if not args.cache:
        few, vocab_size = made_up(min(args.positions, 100_000), args.vocab, args.top_k), args.vocab
    else:
        few, vocab_size = from_cache(Path(args.cache))
    return repeated([replace(r, topk_token_ids=r.topk_token_ids.astype(np.int32)) for r in few], args.positions), (
        vocab_size
    )


def run(args: argparse.Namespace) -> str:
    """Write, read, and say what was seen."""
    records, vocab_size = records_of(args)
    positions = sum(record.positions for record in records)
    candidates = ours(records, vocab_size, args)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.profile:
        return "\n\n".join(profile(candidate, positions, clock) for candidate in candidates)
    candidates += peers(records, vocab_size, args)
    speeds = measure(candidates, positions, args.rounds, clock)
    where = f"{platform.machine()}, one core; load {os.getloadavg()[0]:.1f} of {os.cpu_count()}"
    what = f"{positions} positions of {args.cache or 'made-up records'}, V = {vocab_size}, rows of {args.row_length}"
    where += "; seconds of CPU" if args.cpu_time else ""
    return f"{what}; {where}; medians of {args.rounds}\n\n{table(candidates, speeds, positions)}\n\n{bars(speeds)}"


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    core = max(os.sched_getaffinity(0)) if args.core is None else args.core
    os.sched_setaffinity(0, {core})
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
        print(run(args))
        return
    with tempfile.TemporaryDirectory() as args.folder:
        print(run(args))


if __name__ == "__main__":
    main()
