"""What distillation costs against cross-entropy and against other projects' losses, in time and in peak memory.

    python -m benchmarks.losses                        # V=32768, D=512, K=64, one and two threads
    python -m benchmarks.losses --vocab 131072 --width 1024 --top-k 8 --rounds 3 --groups basics fused same
    python -m benchmarks.losses --all                  # every point of the matrix: hours; the bars at the end
    python -m benchmarks.losses --device cuda          # N=8192, V=151936, D=4096, bfloat16

`bfloat16` is hidden states and weight in it; `autocast` a float32 weight under autocast, as training has it.
Every round runs each candidate once, in turn, so that a slow minute of the machine hits all (what takes more than
`--limit` times as long as CE runs once only, and has a star). The table shows medians, and ratios of medians to
`F.cross_entropy(hidden @ weight.T)` as users write it. Forward and backward.
Groups: `basics` (cross-entropies, and the matmuls alone), `fused` (ours), `same` (other projects' losses with the
objective of our default, the tail bucket), `others` (with objectives of their own). `benchmarks/peers/` says what
each is. The bars (`benchmarks/bars.py`) stand at the end.
"""

import argparse
import os
import platform
from typing import NamedTuple

import torch

from benchmarks import bars
from benchmarks.candidates import CE, FUSED_CE, Absent, Candidate, candidates, select, without_what_is_not_installed
from benchmarks.inputs import Point
from benchmarks.measure import Seen, Times, peak_mib, peak_mib_of_a_child, times
from kd_core.losses.objective import Objective

GROUPS = ("basics", "fused", "same", "others")
CPU_POINT, CUDA_POINT = Point(2048, 32768, 512, 64), Point(8192, 151936, 4096, 64)


class Job(NamedTuple):
    """One point and which candidates run there."""

    point: Point
    groups: tuple[str, ...]


def matrix() -> list[Job]:
    """Every V, D and K. At the larger V with half the positions, so that logits of all of them fit beside copies.

    Peers with other objectives run at K = 64 and the smaller V alone: no bar speaks of them elsewhere.
    """
    jobs = []
    for vocab, positions in ((32768, 2048), (131072, 1024)):
        for width in (512, 1024):
            for top_k in (64, 8, 256):
                everything = vocab == 32768 and top_k == 64
                jobs.append(Job(Point(positions, vocab, width, top_k), GROUPS if everything else GROUPS[:3]))
    return jobs


def child_arguments(args: argparse.Namespace, point: Point, precision: str) -> list[str]:
    named = {**dict(zip(("positions", "vocab", "width", "top-k"), point, strict=True)), "chunk": args.chunk}
    return [*(f"--{name}={value}" for name, value in named.items()), f"--dtypes={precision}", f"--device={args.device}"]


def report(run: bars.Run, rows: list[Candidate], found: Times) -> None:
    """The table of one run; a star marks what ran once only."""
    base, fused = run.seen[CE], run.seen.get(FUSED_CE)
    print(f"\n{run.precision}, {run.threads} thread{'s' * (run.threads > 1)}: {run.point}")
    print(f"{'':27}{'objective':23}{'seconds':>9}{'/ CE':>8}{'/ fused CE':>12}{'peak MiB':>10}{'/ CE':>8}")
    for row in rows:
        if row.name in found.failed:
            print(f"{row.name:27}{row.objective:23}  failed: {found.failed[row.name]}")
            continue
        seconds, mib = run.seen[row.name]
        to_fused = f"{seconds / fused.seconds:12.3f}" if fused else f"{'':12}"
        memory = "" if mib is None else f"{mib:10.0f}" + (f"{mib / base.mib:8.3f}" if base.mib else "")
        star = "*" if row.name in found.slow else " "
        line = f"{row.name:27}{row.objective:23}{seconds:8.3f}{star}{seconds / base.seconds:8.3f}{to_fused}{memory}"
        print(line.rstrip())


def measure(args: argparse.Namespace, job: Job, rows: list[Candidate | Absent]) -> list[bars.Run]:
    """All precisions and thread counts at one point, each printed as soon as it is there."""
    chosen, runs = select(rows, job.groups, args.only), []
    for precision in args.dtypes.split(","):
        memory: dict[str, float | None] = {}
        if args.memory == "yes":
            settings = child_arguments(args, job.point, precision)
            memory = {row.name: peak_mib_of_a_child(settings, row.name) for row in chosen}
        for threads in (int(n) for n in args.threads.split(",")):
            torch.set_num_threads(threads)
            steps = {row.name: row.make() for row in chosen}
            found = times(job.point, precision, steps, args.rounds, args.device, args.limit)
            seen = {name: Seen(value, memory.get(name)) for name, value in found.seconds.items()}
            runs.append(bars.Run(job.point, precision, threads, seen))
            report(runs[-1], chosen, found)
    return runs


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in Point._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--chunk", type=int, default=Objective.chunk_tokens)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", help="default: float32,bfloat16,autocast; on cuda bfloat16")
    parser.add_argument("--threads", help="default: 1,2; on cuda 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--all", action="store_true", help="every point of the matrix")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, help="default: all; with --all as the point needs")
    parser.add_argument("--only", nargs="*", help="candidates to run beside CE as users write it, by name")
    parser.add_argument("--limit", type=float, default=4.0, help="slower than this many times CE: once only")
    parser.add_argument("--memory", choices=("yes", "no"), default="yes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    args.dtypes = args.dtypes or ("bfloat16" if cuda else "float32,bfloat16,autocast")
    args.threads = args.threads or ("1" if cuda else "1,2")
    return args


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The matrix, or one point: the device's, but for what is given."""
    if args.all:
        return [Job(job.point, tuple(args.groups or job.groups)) for job in matrix()]
    default = CUDA_POINT if args.device == "cuda" else CPU_POINT
    given = {name: getattr(args, name) for name in Point._fields if getattr(args, name) is not None}
    return [Job(default._replace(**given), tuple(args.groups or GROUPS))]


def main() -> None:
    args = parsed()
    rows, jobs = candidates(args.chunk), jobs_of(args)
    if args.child:
        torch.set_num_threads(1)
        (row,) = (row for row in rows if row.name == args.child and isinstance(row, Candidate))
        print(peak_mib(jobs[0].point, args.dtypes, row.make(), args.device))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    rows = without_what_is_not_installed(rows)
    print(f"torch {torch.__version__}, {where}, medians of {args.rounds}, chunks of {args.chunk}")
    for row in rows:
        if isinstance(row, Absent):
            print(f"{row.name}: {row.why}")
    runs = [run for job in jobs for run in measure(args, job, rows)]
    print("\n" + bars.table(runs, [row for row in rows if isinstance(row, Candidate)]))


if __name__ == "__main__":
    main()
