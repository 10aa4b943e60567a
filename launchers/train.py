"""Distil a student from a teacher's cache.

    torchrun --nproc-per-node 2 -m launchers.train --config=quickstart
    python -m launchers.train --config=quickstart --config=optimizer.lr=6e-4 --run_dir=runs/faster
    python -m launchers.train --config=quickstart --config=loss.terms.kd.tail=renormalized --dry_run
    python -m launchers.train --config=quickstart --config=parallel.tensor_parallel=3 --dry_run --world=24
    python -m launchers.train --config=run:runs/quickstart --print_config

Run the same line again and it resumes: from the newest whole checkpoint of the run folder, or, once finished, it says
so. With torchrun's --max-restarts=3 it does so by itself when a rank dies. SIGTERM, SIGUSR1, Ctrl-C and the end of
--max_time_per_run save after the step under way, and end with status 0.

--config may be repeated; items are applied in order:
    NAME, NAME(arg=v)      an experiment of experiments/ (the first item)
    run:DIR, config_file:F the frozen record of a run (the first item)
    path=value             one value, e.g. steps=60, loss.terms.kd.weight=1.0, student.folder=my/model
    fiddler:NAME(arg=v)    a function of experiments/ that changes the config
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

from launchers import app, catalog

KIND = "Experiment"
app.define_config_flags(KIND)
RUN_DIR = flags.DEFINE_string("run_dir", None, "Folder of the run; default runs/NAME.")
WORLD = flags.DEFINE_integer(
    "world", 1, "With --dry_run: the ranks to check a layout for; none is started.", lower_bound=1
)
MAX_TIME = flags.DEFINE_string(
    "max_time_per_run", None, "Save and stop after so long, as DD:HH:MM:SS, HH:MM:SS or seconds; of this start alone."
)


def _train(experiment: Any, folder: Path, record: str, text: str) -> None:
    from kd_core.files import owned
    from kd_core.parallel.agreement import prove_same, together
    from kd_core.parallel.mesh import joined_world
    from kd_core.training.run_folder import RunFolder
    from kd_core.training.stopping import Stopping, seconds_of
    from launchers import proof

    run_folder = RunFolder(folder)
    max_seconds = seconds_of(MAX_TIME.value) if MAX_TIME.value else None
    patience = 2 * experiment.parallel.timeout + 30  # the watch, which names a rank, comes first
    with Stopping(max_seconds) as stopping, joined_world(patience) as world, ExitStack() as stack:

        def check() -> dict[str, str]:
            stack.enter_context(owned(folder))
            return experiment.check(world.size)  # before the record is written: a mistake must not occupy the folder

        def claim() -> None:
            run_folder.claim(record, text)
            run_folder.begin_attempt(world)
            for name, value in facts.items():
                app.log.info("%s: %s", name, value)

        facts = world.on_first(check)
        prove_same(world, together(world, lambda: proof.facts(text, experiment))[world.rank])
        world.on_first(claim)
        if experiment.run(run_folder, world, stopping):
            app.log.info("done: %s", folder)


def main() -> None:
    """Resolve the flags, then list, print, check or train."""
    if app.FLAGS.list:
        print(catalog.listing(KIND))
        return
    from launchers import config_items

    resolved = config_items.resolve(app.FLAGS.config, KIND)
    text = config_items.describe(resolved)
    if app.FLAGS.print_config:
        print(text, end="")
        return
    import fiddle as fdl

    experiment = fdl.build(resolved.config)
    folder = Path(RUN_DIR.value or f"runs/{resolved.name}")
    if app.FLAGS.dry_run:
        where = {"checkpoints": str(folder / "checkpoints")}
        for name, value in (experiment.check(WORLD.value) | where).items():
            print(f"{name}: {value}")
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_train)(experiment, folder, config_items.record(resolved.config), text)


if __name__ == "__main__":
    app.start(main, "launchers.train", __doc__ or "", KIND)
