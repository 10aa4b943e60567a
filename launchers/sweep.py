"""Run a sweep: many experiments that differ in a few values, and tables that compare them.

    python -m launchers.sweep --sweep=objectives                                  # plan: points, tokens, cost
    python -m launchers.sweep --sweep=objectives --backend=check                  # every point against its caches
    python -m launchers.sweep --sweep=objectives --backend=local --jobs=2 --out=sweeps/objectives
    python -m launchers.sweep --sweep=my_study.py:by_rate --backend=local --config=steps=20
    python -m launchers.sweep --sweep=objectives --backend=slurm --partition=gpu --gpus_per_node=8 --minutes=240

A sweep is a function of experiments/, or of your own file, that returns a Sweep (see
experiments/base/sweep_definition.py). The same command resumes it: finished points stay as they are, and stopped ones
go on from their checkpoints. If the sweep gets more points, only the new ones run. --config=path=value changes every
point. The plan shows the disk space. --nokeep_checkpoints needs the least, since a finished point then keeps only its
student. Tables: OUT/results.md, results.csv, summary.csv (means over seeds), curves.csv (each validation).
TensorBoard: OUT/tensorboard.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.config import catalog
from launchers.cli import app

if TYPE_CHECKING:
    from experiments.config.sweep_points import Point
    from launchers.sweeps.sweep_folder import SweepFolder

SWEEP = flags.DEFINE_string("sweep", None, "The sweep: NAME, or FILE.py:NAME.")
BACKEND = flags.DEFINE_enum(
    "backend", "plan", ["plan", "check", "local", "slurm", "report"], "What to do with its points (see above)."
)
OUT = flags.DEFINE_string("out", None, "Folder of the sweep; default sweeps/NAME.")
CONFIG = flags.DEFINE_multi_string("config", [], "Changes to every point: path=value, tag:NAME=value or fiddler:NAME.")
LIST = flags.DEFINE_bool("list", False, "List every sweep with its first docstring line, and exit.")
RETRY = flags.DEFINE_bool("retry_failed", False, "Also start failed points again.")
KEEP = flags.DEFINE_bool(
    "keep_checkpoints", True, "Keep the checkpoints of finished points; --nokeep_checkpoints deletes them."
)
NPROC = flags.DEFINE_integer(
    "nproc", None, "Ranks of a point on a machine; default its GPUs under Slurm, else 1.", lower_bound=1
)
RATE = flags.DEFINE_float(
    "tokens_per_second", None, "plan: positions that a point reads in a second, for hours.", lower_bound=1e-9
)
JOBS = flags.DEFINE_integer(
    "jobs", None, "Points at once; default as many as the GPUs give, else 1 (Slurm: 256).", lower_bound=1
)
PARTITION = flags.DEFINE_string("partition", None, "slurm: the partition.")
MINUTES = flags.DEFINE_integer(
    "minutes", 60, "slurm: time of a job; a point that needs more is put back and resumes.", lower_bound=1
)
NODES = flags.DEFINE_integer("nodes", 1, "slurm: nodes of a point.", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus_per_node", 0, "slurm: GPUs of a point on each node.", lower_bound=0)
CPUS = flags.DEFINE_integer("cpus_per_task", None, "slurm: cores of a point on each node.", lower_bound=1)
MORE = flags.DEFINE_multi_string("slurm", [], "slurm: any other option of sbatch, NAME=VALUE.")

SLURM_FLAGS = (PARTITION, MINUTES, NODES, GPUS, CPUS, MORE)


def _left(folder: "SweepFolder", points: Sequence["Point"]) -> list["Point"]:
    """Returns the points to run, and logs how many they are."""
    left = folder.left(points, RETRY.value)
    app.log.info("%d points: %d to run, %d finished or failed before", len(points), len(left), len(points) - len(left))
    return left


def _report(folder: "SweepFolder", points: Sequence["Point"], removed: int) -> None:
    """Writes and prints the tables.

    Raises:
        UsageError: points have failed.
    """
    from kd_core.errors import UsageError
    from launchers.sweeps.results import write_results
    from launchers.sweeps.sweep_folder import FAILED

    print(write_results(folder, points, removed, keep_checkpoints=KEEP.value))
    app.log.info("tables: %s/results.md, results.csv, summary.csv, curves.csv; tensorboard --logdir %s/tensorboard",
                 folder.path, folder.path)  # fmt: skip
    statuses = {point.id: folder.status(point.id) for point in points}
    failed = [f"{point_id} ({status.last_line})" for point_id, status in statuses.items() if status.state == FAILED]
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(points)} points failed: {'; '.join(failed)}. Fix what is wrong and run the same "
            f"command with --retry_failed. What they printed: {folder.path}/points/ID/sweep.log."
        )


def _local(folder: "SweepFolder", points: Sequence["Point"], removed: int) -> None:
    import signal

    from kd_core.errors import UsageError
    from kd_core.parallel.world import usable_cores
    from launchers.sweeps import point_process, slurm_commands
    from launchers.sweeps.local_queue import Queue, StoppedError
    from launchers.sweeps.results import Results

    if queued := slurm_commands.states_by_point(folder, points):
        raise UsageError(
            f"{len(queued)} points are in Slurm's queue ({', '.join(queued)}). Wait for them, or cancel their jobs "
            "with scancel."
        )
    nproc, gpus, cores = NPROC.value or 1, point_process.visible_gpus(), usable_cores()
    slots = point_process.slots(JOBS.value or max(1, len(gpus) // nproc), nproc, gpus, cores)
    results = Results(folder, points, removed, KEEP.value)
    try:
        Queue(folder, _left(folder, points), slots, nproc, results.write_if_due).run()
    except StoppedError as stopped:
        results.write()
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise UsageError(f"stopped by {stopped}. Run the same command again to go on.") from None
    _report(folder, points, removed)


def _slurm(folder: "SweepFolder", points: Sequence["Point"], name: str) -> None:
    from kd_core.errors import UsageError
    from launchers.sweeps import slurm, slurm_commands

    malformed = [option for option in MORE.value if "=" not in option]
    if malformed:
        raise UsageError(f"--slurm={malformed[0]}: wanted NAME=VALUE, as in --slurm=account=lab.")
    options = dict(option.split("=", 1) for option in MORE.value)
    request = slurm.Request(
        PARTITION.value, MINUTES.value, NODES.value, GPUS.value, CPUS.value, JOBS.value or 256, options
    )
    queued = slurm_commands.states_by_point(folder, points)
    points_to_run = [point for point in _left(folder, points) if point.id not in queued]
    by_state = (f"{n} {state}" for state, n in Counter(queued.values()).items())
    app.log.info("%s", ": ".join([f"{len(queued)} are in Slurm's queue", *([", ".join(by_state)] if queued else [])]))
    if points_to_run:
        nproc = NPROC.value or max(1, GPUS.value)
        jobs = slurm.submit(folder, points_to_run, name, request, nproc, keep_checkpoints=KEEP.value)
        app.log.info("submitted %d of %d: jobs %s to %s. Run the same line again for those that are left over; tables: "
                     "--backend=report", len(jobs), len(points_to_run), jobs[0], jobs[-1])  # fmt: skip


def _plan(folder: "SweepFolder", points: Sequence["Point"]) -> None:
    from launchers.sweeps.cost_plan import plan

    print(plan(folder, points, RATE.value))


def _check(points: Sequence["Point"]) -> None:
    from kd_core.errors import UsageError
    from launchers.sweeps.cost_plan import check

    errors = check(points, NODES.value * (NPROC.value or max(1, GPUS.value)))
    if errors:
        raise UsageError(f"{len(errors)} of {len(points)} points are wrong:\n  " + "\n  ".join(errors))
    print(f"{len(points)} points: all fit their students, caches and losses")


def _refuse_flags_of_slurm() -> None:
    from kd_core.errors import UsageError

    slurm_flags = [f"--{flag.name}" for flag in SLURM_FLAGS if flag.present]
    if BACKEND.value == "local" and slurm_flags:
        raise UsageError(f"{', '.join(slurm_flags)}: for --backend=slurm alone; a local queue has --jobs and --nproc.")


def _refuse_missing_caches(folder: "SweepFolder", points: Sequence["Point"]) -> None:
    """Raises where caches of the points to run are missing, before the folder is created."""
    from launchers.sweeps.cost_plan import refuse_missing_caches

    if BACKEND.value != "report":
        refuse_missing_caches(folder.left(points, RETRY.value))


def main() -> None:
    """Finds the sweep, resolves its points, and passes them to the backend."""
    if LIST.value:
        print(catalog.format_listing(catalog.SWEEP))
        return
    from experiments.config import find_sweep, user_code
    from experiments.config.sweep_points import resolve_points
    from kd_core.errors import UsageError
    from kd_core.files import own_folder
    from launchers.cli.folder_guard import A_SWEEP, refuse_other_kinds
    from launchers.sweeps.sweep_folder import SweepFolder

    if not SWEEP.value:
        raise UsageError("no --sweep given. Name one: --sweep=NAME (--list shows them), or --sweep=FILE.py:NAME.")
    name, function = find_sweep.find_sweep(SWEEP.value)
    points = resolve_points(user_code.call_function(function, f"--sweep={SWEEP.value}"), CONFIG.value, name)
    folder = SweepFolder(Path(OUT.value or f"sweeps/{name}"))
    _refuse_flags_of_slurm()
    if BACKEND.value == "plan":
        _plan(folder, points)
        return
    if BACKEND.value == "check":
        _check(points)
        return
    refuse_other_kinds(folder.path, A_SWEEP, "out")
    _refuse_missing_caches(folder, points)
    with own_folder(folder.path):
        removed = folder.claim(name, points)
        if removed:
            ids = ", ".join(point["id"] for point in removed)
            app.log.info("%d earlier points are no longer in the sweep; their folders are kept: %s", len(removed), ids)
        if BACKEND.value == "local":
            _local(folder, points, len(removed))
        elif BACKEND.value == "slurm":
            _slurm(folder, points, name)
        else:
            _report(folder, points, len(removed))


if __name__ == "__main__":
    app.run_command(
        main, "launchers.sweep", f"{__doc__}\nSweeps of experiments/:\n{catalog.format_listing(catalog.SWEEP)}"
    )
