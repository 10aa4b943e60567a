"""The loop: from the newest whole checkpoint, or from the start, to the last step.

    batches of a step → train_step → (validation, continuations) → metrics → (checkpoint) → (told to stop?)

Everything that varies with the step (learning rate, random state, rows read) is a function of it, so a run that
was killed and resumed computes what it would have computed.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kd_core.errors import NonFiniteError, UsageError
from kd_core.losses.objective import Objective
from kd_core.parallel.collectives import gathered, prove_same
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.async_saver import Saver
from kd_core.training.checkpoints.checkpoint import Checkpoint, Progress
from kd_core.training.checkpoints.checkpoint_state import check_kept, settings_of_groups
from kd_core.training.evaluation import Asked, HeldOut, Metric, evaluate_all
from kd_core.training.generation import Prompts, continuations
from kd_core.training.lr_schedule import Schedule, rate_factor
from kd_core.training.monitoring.hang_watchdog import Pulse, watched
from kd_core.training.monitoring.histograms import histograms_of_step
from kd_core.training.monitoring.metric_log import MetricLog, per_token
from kd_core.training.monitoring.progress_line import Live
from kd_core.training.monitoring.slow_start import SlowStart
from kd_core.training.optimizer import Optimizer, set_rates
from kd_core.training.run_folder import RunFolder, write_failed_batch
from kd_core.training.step import count, train_step
from kd_core.training.stop_signals import Stopping
from kd_core.types import Batch

log = logging.getLogger("kd")
SHOWN = ("loss", "nll", "kl", "renormalized_kl", "teacher_cross_entropy", "top1_agreement", "ece")


@dataclass(frozen=True)
class Recipe:
    """What the loop needs to know of an experiment, each part under its own name."""

    loss: Objective
    optimizer: Optimizer
    schedule: Schedule
    parallel: Parallel
    checkpoint: Checkpoint
    steps: int
    seed: int
    rows_per_step: int
    tokens_per_step: int
    log_every: int
    line_every: int
    histograms_every: int
    evaluate_every: int
    metrics: Sequence[Metric]

    def due(self, step: int, every: int) -> bool:
        """Every so many steps, and after the last."""
        return step == self.steps or step % every == 0

    def wants_histograms(self, step: int) -> bool:
        """Every so many steps; 0 is never."""
        return self.histograms_every > 0 and self.due(step, self.histograms_every)


@dataclass(frozen=True)
class Data:
    """Where batches come from: `steps_from(rows)` yields a step's micro-batches. Held-out caches by name, how many
    bytes of text each token stands for, and what is to be continued."""

    steps_from: Callable[[int], Generator[Sequence[Batch]]]
    held_out: Mapping[str, HeldOut]
    token_bytes: Tensor
    prompts: Prompts


@dataclass
class _Run:
    """A run under way: `progress` is what of it is done."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    data: Data
    recipe: Recipe
    folder: RunFolder
    world: World
    pulse: Pulse
    progress: Progress = field(default_factory=Progress)
    metrics: MetricLog | None = None
    group_settings: list[dict[str, Any]] | None = None  # as built, until a step has shown that they stay

    def restore(self) -> bool:
        """Load the newest whole checkpoint, where there is one."""
        self.pulse.enter("loading a checkpoint")
        newest = checkpoint.newest_whole(self.folder.checkpoints, self.world, self.pulse.moved)
        if newest is not None:
            self.progress = checkpoint.load(newest, self.model, self.optimizer)
            if self.progress.rows != (wanted := self.progress.step * self.recipe.rows_per_step):
                raise UsageError(
                    f"{newest / 'progress.json'}: {self.progress.rows} rows were read by step {self.progress.step}; "
                    f"wanted {wanted}. Take another checkpoint."
                )
            log.info("resumed from %s: %d of %d steps are done", newest, self.progress.step, self.recipe.steps)
        cursor = {"the step": str(self.progress.step), "the data cursor (rows)": str(self.progress.rows)}
        prove_same(self.world, cursor)
        return newest is not None

    def steps(self) -> Generator[tuple[int, Sequence[Batch], float]]:
        """The steps that are left, with their batches and the seconds that each waited for them."""
        with closing(self.data.steps_from(self.progress.rows)) as batches_of:
            for step in range(self.progress.step + 1, self.recipe.steps + 1):
                self.pulse.enter(f"reading data of step {step}")
                started = time.perf_counter()
                batches = next(batches_of)
                yield step, batches, time.perf_counter() - started

    def validate(self, step: int) -> dict[str, float]:
        """Numbers on the held-out cache."""
        recipe = self.recipe
        asked = Asked(recipe.loss.at(step, recipe.steps), recipe.metrics, self.data.token_bytes)
        self.pulse.enter(f"in validation at step {step}")
        found = evaluate_all(
            self.model, self.data.held_out, asked=asked, parallel=recipe.parallel, world=self.world
        )  # fmt: skip
        shown = ", ".join(f"{name} {found[f'val/{name}']:.4f}" for name in SHOWN if f"val/{name}" in found)
        log.info("validation at step %d: %s", step, shown)
        if wrong := [name for name in SHOWN if not math.isfinite(found.get(f"val/{name}", 0.0))]:
            log.warning(
                "validation at step %d: %s not finite: the student has diverged. A step whose loss is not finite stops "
                "the run; this one's checkpoint is never the best. Lower optimizer.lr, or warm up for longer.",
                step, f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'}",
            )  # fmt: skip
        if self.data.prompts.texts:
            self.pulse.enter(f"in continuations at step {step}")
            said = continuations(self.model, self.data.prompts, recipe.parallel, self.world)
            if self.metrics:
                self.metrics.add_continuations(step, said)
        return found

    def take_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step and its numbers."""
        recipe, started = self.recipe, time.perf_counter()
        self.pulse.enter(f"in forward and backward of step {step}")
        torch.manual_seed((recipe.seed * 1_000_003 + step * 1_009 + self.world.dp_rank) % (1 << 63))
        factor = rate_factor(recipe.schedule, step, recipe.steps)
        set_rates(self.optimizer, factor)
        done = replace(self.progress, step=step, rows=step * recipe.rows_per_step, metric=None)
        wanted = recipe.wants_histograms(step)
        look = histograms_of_step(self.model, self.optimizer, self.world) if wanted else nullcontext({})
        try:
            with look as histograms:
                result = train_step(
                    self.model,
                    self.optimizer,
                    batches,
                    objective=recipe.loss.at(step, recipe.steps),
                    clip_norm=recipe.optimizer.clip_norm,
                    parallel=recipe.parallel,
                    world=self.world,
                )
        except NonFiniteError as error:
            self.progress = replace(done, skipped=done.skipped + 1)
            return self._skipped(error, step, batches)
        self.progress = done
        if self.group_settings is not None and result.moved:
            check_kept(self.model, self.optimizer, self.group_settings)
            self.group_settings = None
        if not result.moved:
            why = "every weight of the objective is 0" if result.tokens else "no position of it is scored"
            log.warning("step %d: %s, so nothing has moved (no decay, no momentum)", step, why)
        seconds = time.perf_counter() - started
        if histograms and self.metrics:
            self.metrics.add_histograms(step, histograms)
        return {
            **per_token("train", result.sums, result.tokens),
            "data/damaged_blocks": float(result.damaged_blocks),
            "train/skipped_steps": float(done.skipped),
            "train/lr": factor * recipe.optimizer.lr,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": result.tokens / seconds,
            "speed/step_seconds": seconds,
        }

    def _skipped(self, error: NonFiniteError, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """Note the records of a step that did not move the student; go on without it, or stop."""
        names = [name for batch in batches for name in batch.record_names]
        path = write_failed_batch(self.folder.path, step, self.world.rank, names, str(error))
        gathered(self.world, None)  # every rank has written before any of them stops
        shown = f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        said = f"step {step}: {error}. The optimiser has not moved. Records of the step on rank {self.world.rank}: "
        said += f"{shown} (all in {path})"
        settings = self.recipe.optimizer
        if settings.on_non_finite == "stop" or self.progress.skipped > settings.max_skipped:
            skipped = f" Steps skipped: {self.progress.skipped}." if settings.on_non_finite == "skip" else ""
            raise NonFiniteError(
                f"{said}.{skipped} Look at them, lower optimizer.lr, run with parallel.precision=float32, or skip "
                "such steps (optimizer.on_non_finite=skip); the last checkpoint is kept."
            )
        log.warning("%s; the step is skipped", said)
        _, damaged_blocks = count(batches, self.world)
        return {"data/damaged_blocks": float(damaged_blocks), "train/skipped_steps": float(self.progress.skipped)}

    def note(self, step: int, values: dict[str, float], held_out: dict[str, float]) -> None:
        """Write the numbers of a step where they are due; counts that add up over the lines are never left out."""
        due = held_out or values.get("data/damaged_blocks") or self.recipe.due(step, self.recipe.log_every)
        if self.metrics and due:
            self.metrics.add(step, {**values, **held_out})

    def save(self, saver: Saver, held_out: dict[str, float]) -> None:
        """A checkpoint of what is done, with the metric by which the best are kept where the step was validated."""
        self.pulse.enter(f"in saving step {self.progress.step}")
        metric = held_out.get(self.recipe.checkpoint.best_metric)
        saver.save(replace(self.progress, metric=metric), self.model, self.optimizer)


def run(model: Decoder, data: Data, recipe: Recipe, folder: RunFolder, world: World, *, stopping: Stopping) -> bool:
    """Train to `recipe.steps`; False where the run was stopped before, and saved.

    Raises:
        NonFiniteError: loss or gradient was not finite, more often than is allowed.
        UsageError: no checkpoint is whole, or one cannot be written.
    """
    with ExitStack() as stack:
        pulse = stack.enter_context(watched(world, recipe.parallel.timeout))
        stack.callback(model.register_forward_pre_hook(pulse.seen).remove)  # each micro-batch is progress
        this = _Run(model, recipe.optimizer.build(model), data, recipe, folder, world, pulse)
        this.group_settings = settings_of_groups(this.optimizer)
        resumed = this.restore()
        if this.progress.step == recipe.steps:
            log.info("nothing left to train")
            return True
        saver = stack.enter_context(Saver(folder.checkpoints, recipe.checkpoint, folder.record(), world, pulse))
        if world.is_first:
            this.metrics = stack.enter_context(MetricLog(folder.path, this.progress.step if resumed else None))
        if not resumed:
            this.note(0, {}, this.validate(0))
        # From here, so that the time that is left does not hold the first validation once for each step to come.
        slow_start = SlowStart(model, recipe.parallel, world, recipe.steps - this.progress.step)
        live = stack.enter_context(Live(recipe.steps, this.progress.step, recipe.line_every, world))
        for step, batches, waited in stack.enter_context(closing(this.steps())):
            started = time.perf_counter()
            values = this.take_step(step, batches)
            values |= live.speed(step, time.perf_counter() - started, waited)
            slow_start.add(recipe.tokens_per_step, values.get("speed/step_seconds", 0.0), waited)
            held_out = this.validate(step) if recipe.due(step, recipe.evaluate_every) else {}
            this.note(step, values, held_out)
            told = stopping.agreed(world)
            if told or recipe.due(step, recipe.checkpoint.every):
                this.save(saver, held_out)
            live.show(step, values)
            if told and step < recipe.steps:
                saver.wait()
                log.info("stopped after step %d of %d, %s; it is saved. Run the same command again to go on.",
                         step, recipe.steps, told)  # fmt: skip
                return False
        if this.metrics:
            this.metrics.end()
        return True
