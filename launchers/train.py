"""Distil a student from a teacher's cache.

    torchrun --nproc-per-node 2 -m launchers.train --config=quickstart
    python -m launchers.train --config=quickstart --config=optimizer.lr=6e-4 --run_dir=runs/faster
    python -m launchers.train --config=quickstart --config=loss.terms.kd.tail=renormalized --dry_run
    python -m launchers.train --config=quickstart --config=parallel.tensor_parallel=3 --dry_run --world=24
    python -m launchers.train --config=quickstart --config=parallel.context_parallel=2 --dry_run --world=8
    python -m launchers.train --config=quickstart --config=fiddler:nemo_aligner --diff
    python -m launchers.train --config=run:runs/quickstart --run_dir=runs/again

The same command resumes a run from the newest complete checkpoint of its folder, or reports that it has finished.
With torchrun's --max-restarts=3 it resumes by itself when a rank dies. SIGTERM, SIGUSR1, Ctrl-C and the end of
--max_time_per_run save after the current step, and end with status 0. --profile=5 traces five steps.

With more steps, and thus another schedule, a run goes on, finished or not. What changed is recorded:
    --config=run:runs/quickstart --config=steps=90 --run_dir=runs/quickstart

--config may be repeated; items are applied in order:
    NAME, NAME(arg=v)      an experiment of experiments/ (the first item)
    FILE.py:NAME(arg=v)    an experiment of your own file, anywhere (the first item)
    run:DIR, config_file:F the frozen record of a run (the first item); run: first prints what differs since then
    path=value             one value, e.g. steps=60, loss.terms.kd.weight=1.0, student.folder=my/model
    tag:NAME=value         all values that must agree, e.g. tag:RowLength=1024
    fiddler:NAME(arg=v)    a function of experiments/ that changes the config, e.g. 'fiddler:cache(folder="my/cache")';
                           or fiddler:FILE.py:NAME(arg=v)

Your own experiment is a function in a file of your own, under experiments/ or elsewhere. It needs no registration.
--config= may be left out: quickstart steps=5.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launchers.cli import app

if TYPE_CHECKING:
    from kd_core.precision import ChosenPrecision

KIND = "Experiment"
app.define_config_flags(KIND)
RUN_DIR = flags.DEFINE_string("run_dir", None, "Folder of the run; default runs/NAME.")
WORLD = flags.DEFINE_integer(
    "world", 1, "With --dry_run: the ranks to check a layout for; none is started.", lower_bound=1
)
MAX_TIME = flags.DEFINE_string(
    "max_time_per_run", None, "Save and stop after this time, as DD:HH:MM:SS, HH:MM:SS or seconds; for this start only."
)
PROFILE = flags.DEFINE_integer(
    "profile",
    0,
    "Trace this many steps, from the third of this start on, into the run folder's profile/.",
    lower_bound=0,
)


GOES_ON = (
    "goes on to %d steps: what varies with the step (the learning rate, weights of losses) follows its schedule over "
    "all of them from now on; the earlier record and student are kept in %s"
)


def _claim(run_folder: Any, resolved: Any, text: str, facts: dict[str, Any]) -> None:
    """Writes the records of the run and of this start. Logs the settings that differ from the run's record."""
    from experiments.config import code_hashes, config_items
    from experiments.config.frozen_records import keeps_code
    from kd_core.parallel.config import LAYOUT_SETTINGS

    may_change = frozenset(f"parallel.{name}" for name in LAYOUT_SETTINGS)
    record, path = config_items.record_json(resolved.config), run_folder.path / "config.json"
    # A record that keeps user code is not described, since that would run the code. Its settings as text serve instead.
    describe = None if path.exists() and keeps_code(path) else lambda: config_items.recorded_text(path)
    changed = run_folder.claim(record, text, may_change, describe)
    attempt = run_folder.begin_attempt({**facts, "changed": changed})
    code_hashes.write_code(attempt)
    for name, change in changed.items():
        kind = "layout" if name in may_change else "length" if name == "steps" else "schedule"
        app.log.info("resumed with another %s: %s is %s", kind, name, change)
    if "steps" in changed:
        run_folder.change_record(attempt, record, text)
        app.log.info(GOES_ON, resolved.config.steps, attempt / "before")


def _set_precision(experiment: Any, resolved: Any, chosen: "ChosenPrecision") -> Any:
    """Returns the experiment with the chosen precision, and writes it into the config that is recorded."""
    if experiment.parallel.precision == chosen.precision:
        return experiment
    resolved.config.parallel.precision = chosen.precision
    resolved.set_by["parallel.precision"] = chosen.reason
    return replace(experiment, parallel=replace(experiment.parallel, precision=chosen.precision))


def _train(experiment: Any, folder: Path, resolved: Any, max_seconds: float | None) -> None:
    from experiments.config import code_hashes, config_items, record_diff
    from kd_core.files import own_folder
    from kd_core.parallel.collectives import assert_ranks_agree, run_on_all_ranks
    from kd_core.parallel.world import joined_world
    from kd_core.precision import choose_precision
    from kd_core.training.monitoring.profiler import trace_steps
    from kd_core.training.run_folder import RunFolder, attempt_facts
    from kd_core.training.stop_signals import StopSignals
    from launchers.cli import rank_facts
    from launchers.cli.folder_guard import A_RUN, refuse_other_kinds

    run_folder = RunFolder(folder)
    patience = 2 * experiment.parallel.timeout + 30  # longer than the watchdog, which names the rank
    with StopSignals(max_seconds) as stopping, joined_world(patience) as world, ExitStack() as stack:
        precision = experiment.parallel.precision
        chosen = world.run_on_first(lambda: choose_precision(precision, world.device, run_folder.precision()))
        experiment = _set_precision(experiment, resolved, chosen)
        text = config_items.describe(resolved)

        def check() -> dict[str, str]:
            refuse_other_kinds(folder, A_RUN, "run_dir")
            stack.enter_context(own_folder(folder))
            # Checked before the record is written, so that a mistake leaves no run in the folder.
            check_lines = experiment.check(world.size)
            return {"precision": str(chosen), **check_lines}

        def claim() -> None:
            facts = {**attempt_facts(world, experiment.inputs()), **code_hashes.code_facts(resolved.repeats)}
            difference_lines = record_diff.differences_before(run_folder, resolved, facts)  # from earlier attempts
            _claim(run_folder, resolved, text, facts)
            for line in (*difference_lines, *(f"{name}: {value}" for name, value in check_lines.items())):
                app.log.info("%s", line)
            chosen.warn_if_slow("parallel.precision")
            for setting in experiment.unused():
                app.log.warning("unused: %s.", setting)

        check_lines = world.run_on_first(check)
        experiment.share_manifests(world)
        assert_ranks_agree(
            world, run_on_all_ranks(world, lambda: rank_facts.collect_facts(text, experiment))[world.rank]
        )
        world.run_on_first(claim)
        stack.enter_context(trace_steps(PROFILE.value, folder / "profile", world.rank))
        if experiment.run(run_folder, world, stopping):
            app.log.info("done: %s", folder)


def _differences(experiment: Any, resolved: Any, device: Any) -> str:
    """Reports how a run of `--world` ranks on this machine would differ from the run that it repeats."""
    from experiments.config import code_hashes, record_diff
    from kd_core.parallel.world import World
    from kd_core.training.run_folder import attempt_facts

    facts = attempt_facts(World(size=WORLD.value, device=device), experiment.inputs())
    return record_diff.report(resolved, {**facts, **code_hashes.code_facts()})


def _dry_run(experiment: Any, resolved: Any, folder: Path) -> None:
    """Prints the precision and the checks of a run on this machine, without starting it."""
    import torch

    from kd_core.errors import escape_unprintable
    from kd_core.precision import choose_precision
    from kd_core.training.run_folder import RunFolder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_precision(experiment.parallel.precision, device, RunFolder(folder).precision())
    facts = {"precision": chosen, **experiment.check(WORLD.value), "checkpoints": folder / "checkpoints"}
    for name, value in facts.items():
        print(escape_unprintable(f"{name}: {value}"))
    chosen.warn_if_slow("parallel.precision")
    for setting in experiment.unused():
        print(escape_unprintable(f"unused: {setting}."))
    if resolved.repeats:
        print("\n".join(map(escape_unprintable, _differences(experiment, resolved, device).split("\n"))))


def main() -> None:
    """Resolves the flags, then lists, prints, checks or trains."""
    resolved = app.resolve_flags(KIND)
    if resolved is None:
        return
    from kd_core.errors import UsageError
    from kd_core.training.stop_signals import parse_seconds

    if WORLD.present and not app.FLAGS.dry_run:
        raise UsageError("--world: is for --dry_run; ranks are started by torchrun --nproc-per-node.")
    max_seconds = parse_seconds(MAX_TIME.value) if MAX_TIME.value else None
    experiment = resolved.build()
    experiment.fetch()
    folder = Path(RUN_DIR.value or f"runs/{resolved.name}")
    if app.FLAGS.dry_run:
        _dry_run(experiment, resolved, folder)
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_train)(experiment, folder, resolved, max_seconds)


if __name__ == "__main__":
    app.run_command(main, "launchers.train", __doc__ or "", KIND)
