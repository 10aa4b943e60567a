"""Distil a student from a teacher's cache.

    torchrun --nproc-per-node 2 -m launchers.train --config=quickstart
    python -m launchers.train --config=quickstart --config=optimizer.lr=6e-4 --run_dir=runs/faster
    python -m launchers.train --config=quickstart --config=loss.terms.kd.tail=renormalized --dry_run
    python -m launchers.train --config=quickstart --config=fiddler:nemo_aligner --diff
    python -m launchers.train --config=run:runs/quickstart --run_dir=runs/again

Run the same line again and it resumes: from the newest checkpoint of the run folder, or, once finished, it says so.

--config may be repeated; items are applied in order:
    NAME, NAME(arg=v)      an experiment of experiments/ (the first item)
    run:DIR, config_file:F the frozen record of a run (the first item); run: first says what differs since
    path=value             one value, e.g. steps=60, loss.terms.kd.weight=1.0, student.folder=my/model
    tag:NAME=value         all values that must agree, e.g. tag:RowLength=1024
    fiddler:NAME(arg=v)    a function of experiments/ that changes the config, e.g. 'fiddler:cache(folder="my/cache")'

Your own experiment is a function in a file of your own under experiments/; it needs no registration.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

from launchers import app

KIND = "Experiment"
app.define_config_flags(KIND)
RUN_DIR = flags.DEFINE_string("run_dir", None, "Folder of the run; default runs/NAME.")


def _train(experiment: Any, folder: Path, resolved: Any) -> None:
    from kd_core.files import owned
    from kd_core.parallel.mesh import joined_world
    from kd_core.training.run_folder import RunFolder, attempt_facts
    from launchers import config_items, repeat

    run_folder = RunFolder(folder)
    with joined_world() as world, ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(owned(folder))
            shown = experiment.check()  # before the record is written: a mistake must not occupy the folder
            facts = attempt_facts(world, experiment.inputs())
            said = repeat.report(resolved, facts) if resolved.repeats else ""  # of the attempts before this one
            run_folder.claim(config_items.record(resolved.config), config_items.describe(resolved))
            run_folder.begin_attempt(facts)
            for line in (*said.splitlines(), *(f"{name}: {value}" for name, value in shown.items())):
                app.log.info("%s", line)
            for setting in experiment.unused():
                app.log.warning("unused: %s.", setting)

        world.on_first(claim)
        experiment.run(run_folder, world)
        app.log.info("done: %s", folder)


def main() -> None:
    """Resolve the flags, then list, print, check or train."""
    resolved = app.resolve_flags(KIND)
    if resolved is None:
        return
    import fiddle as fdl

    experiment: Any = fdl.build(resolved.config)
    if app.FLAGS.dry_run:
        for name, value in experiment.check().items():
            print(f"{name}: {value}")
        for setting in experiment.unused():
            print(f"unused: {setting}.")
        return
    folder = Path(RUN_DIR.value or f"runs/{resolved.name}")
    _train(experiment, folder, resolved)


if __name__ == "__main__":
    app.start(main, "launchers.train", __doc__ or "", KIND)
