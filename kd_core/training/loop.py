"""The training loop, from the newest undamaged checkpoint or the start, to the last step.

    batches of a step → begin_step → numbers → (validation, continuations) → metrics → (checkpoint), next batches, stop?

On a GPU the numbers of a step are read behind the next one, unless a validation or a checkpoint needs them before.
Everything that varies with the step (learning rate, random state, rows read) is a function of it. A run that was
killed and resumed therefore computes the same as one that was not (on a GPU up to rounding: docs/training.md).
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kd_core.errors import NonFiniteError, UsageError
from kd_core.losses.metric_table import BRIEF
from kd_core.parallel.collectives import all_gather_values, assert_ranks_agree
from kd_core.parallel.transfers import Stopwatch
from kd_core.parallel.world import World
from kd_core.students.student import Student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.async_saver import Saver
from kd_core.training.checkpoints.checkpoint import Progress
from kd_core.training.checkpoints.checkpoint_state import check_resumable, read_group_settings
from kd_core.training.evaluation import EvaluationRequest, HeldOutCache, evaluate_all
from kd_core.training.generation import Prompts, continuations
from kd_core.training.lr_schedule import rate_factor
from kd_core.training.monitoring.hang_watchdog import Pulse, watch_for_hangs
from kd_core.training.monitoring.histograms import histograms_of_step
from kd_core.training.monitoring.metric_log import MetricLog, per_token
from kd_core.training.monitoring.progress_line import ProgressLine
from kd_core.training.monitoring.slow_start import SlowStart
from kd_core.training.optimizer import peak_rates, set_rates
from kd_core.training.run_folder import RunFolder, write_failed_batch
from kd_core.training.run_settings import RunSettings
from kd_core.training.step import BegunStep, begin_step, count_tokens_and_damage
from kd_core.training.step_reader import StepReader
from kd_core.training.stop_signals import StopSignals
from kd_core.types import Batch

log = logging.getLogger("kd")


@dataclass(frozen=True)
class Data:
    """The data of a run: training batches, held-out caches by name, and prompts.

    `steps_from(rows)` yields the micro-batches of one step after another, behind the first `rows` rows of the run's
    order, which is of version `order`. `token_bytes` holds how many bytes of text each token stands for, int [V].
    """

    steps_from: Callable[[int], Generator[Sequence[Batch]]]
    held_out: Mapping[str, HeldOutCache]
    token_bytes: Tensor
    prompts: Prompts
    order: int = 1


@dataclass(frozen=True)
class _Begun:
    """A step that has begun: its batches, histograms, rates by metric, its time, and the seconds it waited for data."""

    step: int
    batches: Sequence[Batch]
    result: BegunStep
    histograms: dict[str, dict[str, Any]]
    rates: dict[str, float]
    stopwatch: Stopwatch
    waited: float


@dataclass
class _Run:
    """The state of a run under way. `progress` counts the steps and rows that are done."""

    model: Student
    optimizer: torch.optim.Optimizer
    data: Data
    settings: RunSettings
    folder: RunFolder
    world: World
    pulse: Pulse
    progress: Progress = field(default_factory=Progress)
    metrics: MetricLog | None = None
    group_settings: list[dict[str, Any]] | None = None  # as built, until the first step has left them unchanged
    begun: deque[_Begun] = field(default_factory=deque[_Begun])  # steps whose numbers are not read yet

    def is_due(self, step: int, *every: int) -> bool:
        """Returns True for multiples of any of `every`, and for the last step."""
        return step == self.settings.steps or any(step % steps == 0 for steps in every)

    def restore(self) -> bool:
        """Loads the newest undamaged checkpoint. Returns False if there is none.

        Raises:
            UsageError: the checkpoint's rows do not fit its steps, or ranks would resume from different steps.
        """
        self.pulse.enter("loading a checkpoint")
        newest = checkpoint.newest_undamaged(self.folder.checkpoints, self.world, self.pulse.beat)
        if newest is not None:
            self.progress = checkpoint.load(newest, self.model, self.optimizer, self.data.order)
            if self.progress.rows != (expected_rows := self.progress.step * self.settings.rows_per_step):
                raise UsageError(
                    f"{newest / 'progress.json'}: {self.progress.rows} rows were read by step {self.progress.step}; "
                    f"wanted {expected_rows}. Use another checkpoint."
                )
            log.info("resumed from %s: %d of %d steps are done", newest, self.progress.step, self.settings.steps)
        cursor = {"the step": str(self.progress.step), "the data cursor (rows)": str(self.progress.rows)}
        assert_ranks_agree(self.world, cursor)
        return newest is not None

    def validate(self, step: int) -> dict[str, float]:
        """Returns metrics on the held-out caches, and logs continuations of the prompts."""
        settings = self.settings
        objective = settings.loss.at(step, settings.steps)
        asked = EvaluationRequest(objective, settings.evaluation.metrics, self.data.token_bytes)
        self.pulse.enter(f"in validation at step {step}")
        metrics = evaluate_all(
            self.model, self.data.held_out, asked=asked, parallel=settings.parallel, world=self.world
        )  # fmt: skip
        shown = ", ".join(f"{name} {metrics[f'val/{name}']:.4f}" for name in BRIEF if f"val/{name}" in metrics)
        log.info("validation at step %d: %s", step, shown)
        if not_finite := [name for name in BRIEF if not math.isfinite(metrics.get(f"val/{name}", 0.0))]:
            log.warning(
                "validation at step %d: %s not finite: the student has diverged. A step whose loss is not finite stops "
                "the run; this one's checkpoint is never the best. Lower optimizer.lr, or warm up for longer.",
                step, f"{', '.join(not_finite)} {'is' if len(not_finite) == 1 else 'are'}",
            )  # fmt: skip
        if self.data.prompts.texts:
            self.pulse.enter(f"in continuations at step {step}")
            texts = continuations(self.model, self.data.prompts, settings.parallel, self.world)
            if self.metrics:
                self.metrics.add_continuations(step, texts)
        return metrics

    def begin_step(self, step: int, batches: Sequence[Batch], waited: float) -> _Begun:
        """Begins one optimiser step, whose numbers `end_step` reads."""
        settings, stopwatch = self.settings, Stopwatch(self.world.device)
        self.pulse.enter(f"in forward and backward of step {step}")
        # A seed of each step and of the ranks with the same positions, so that checkpoints need no random state.
        reader = self.world.rank // self.world.layout.tensor
        torch.manual_seed((settings.seed * 1_000_003 + step * 1_009 + reader) % (1 << 63))
        factor = rate_factor(settings.schedule, step, settings.steps)
        set_rates(self.optimizer, factor)
        every, recorder = settings.logger.histograms_every, nullcontext[dict[str, dict[str, Any]]]({})
        if every > 0 and self.is_due(step, every):
            recorder = histograms_of_step(self.model, self.optimizer, self.world)
        with recorder as histograms:
            result = begin_step(
                self.model, self.optimizer, batches, objective=settings.loss.at(step, settings.steps),
                clip_norm=settings.optimizer.clip_norm, parallel=settings.parallel, world=self.world,
            )  # fmt: skip
        stopwatch.stop()
        rates = {f"train/{name}": factor * peak for name, peak in peak_rates(settings.optimizer).items()}
        return _Begun(step, batches, result, histograms, rates, stopwatch, waited)

    def end_step(self, begun: _Begun) -> dict[str, float]:
        """Reads the numbers of a step, and returns its metrics.

        Raises:
            NonFiniteError: as in `_handle_non_finite`.
            UsageError: the first step changed optimiser settings that no checkpoint holds.
        """
        step = begun.step
        self.pulse.enter(f"reading numbers of step {step}")
        after_step = replace(self.progress, step=step, rows=step * self.settings.rows_per_step, metric=None)
        try:
            result = begun.result.read()
        except NonFiniteError as error:
            self.progress = replace(after_step, skipped=after_step.skipped + 1)
            return self._handle_non_finite(error, step, begun.batches)
        self.progress = after_step
        if self.group_settings is not None and result.moved:
            check_resumable(self.model, self.optimizer, self.group_settings)
            self.group_settings = None
        if not result.moved:
            reason = "every weight of the objective is 0" if result.tokens else "no position of it is scored"
            log.warning("step %d: %s, so nothing has moved (no decay, no momentum)", step, reason)
        seconds = begun.stopwatch.seconds()
        if begun.histograms and self.metrics:
            self.metrics.add_histograms(step, begun.histograms)
        return {
            **per_token("train", result.sums, result.tokens),
            "data/damaged_blocks": float(result.damaged_blocks),
            "train/skipped_steps": float(after_step.skipped),
            **begun.rates,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": result.tokens / seconds,
            "speed/step_seconds": seconds,
        }

    def _handle_non_finite(self, error: NonFiniteError, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """Writes the record names of a step that did not move the student, and returns the step's metrics.

        Raises:
            NonFiniteError: the settings do not allow the step to be skipped.
        """
        names = [name for batch in batches for name in batch.record_names]
        path = write_failed_batch(self.folder.path, step, self.world.rank, names, str(error))
        all_gather_values(self.world, None)  # every rank has written before any of them stops
        shown = f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        message = f"step {step}: {error}. This step has not moved the optimiser. Records of the step on rank "
        message += f"{self.world.rank}: {shown} (all in {path})"
        optimizer = self.settings.optimizer
        if optimizer.on_non_finite == "stop" or self.progress.skipped > optimizer.max_skipped:
            skipped = f" Steps skipped: {self.progress.skipped}." if optimizer.on_non_finite == "skip" else ""
            raise NonFiniteError(
                f"{message}.{skipped} Inspect them, lower optimizer.lr, run with parallel.precision=float32, or skip "
                "such steps (optimizer.on_non_finite=skip); the last checkpoint is kept."
            )
        log.warning("%s; the step is skipped", message)
        _, damaged_blocks = count_tokens_and_damage(batches, self.world)
        return {"data/damaged_blocks": float(damaged_blocks), "train/skipped_steps": float(self.progress.skipped)}

    def report_steps(self, live: ProgressLine, slow_start: SlowStart, *, all_of_them: bool) -> dict[str, float]:
        """Reports the steps begun, and returns the held-out metrics of the latest. May leave the last one for later."""
        held_out: dict[str, float] = {}
        while self.begun and (all_of_them or len(self.begun) > 1 or not self.begun[0].result.is_late):
            begun = self.begun.popleft()
            step, values = begun.step, self.end_step(begun)
            values |= live.speed(step, begun.stopwatch.seconds(), begun.waited)
            slow_start.add(self.settings.tokens_per_step, values.get("speed/step_seconds", 0.0), begun.waited)
            held_out = self.validate(step) if self.is_due(step, self.settings.evaluation.every) else {}
            self.log_metrics(step, values, held_out)
            live.show(step, values)
        return held_out

    def log_metrics(self, step: int, values: dict[str, float], held_out: dict[str, float]) -> None:
        """Writes the metrics of a step if they are due.

        Steps with damaged blocks are always written, because that count is added up over the lines.
        """
        is_due = held_out or values.get("data/damaged_blocks") or self.is_due(step, self.settings.logger.every)
        if self.metrics and is_due:
            self.metrics.add(step, {**values, **held_out})

    def save(self, saver: Saver, held_out: dict[str, float]) -> Literal[True]:
        """Begins a checkpoint of the progress, with the metric that ranks checkpoints if the step was validated."""
        self.pulse.enter(f"in saving step {self.progress.step}")
        metric = held_out.get(self.settings.checkpoint.best_metric)
        saver.save(replace(self.progress, metric=metric), self.model, self.optimizer)
        return True


def run(
    model: Student, data: Data, settings: RunSettings, folder: RunFolder, world: World, *, stopping: StopSignals
) -> bool:
    """Trains to `settings.steps`. Returns False if the run was stopped and saved before its last step.

    Raises:
        NonFiniteError: the loss or a gradient was not finite, more often than the settings allow.
        UsageError: all checkpoints are damaged, one cannot be written, or the data of a step cannot be read.
    """
    with ExitStack() as stack:
        pulse = stack.enter_context(watch_for_hangs(world, settings.parallel.timeout))
        stack.callback(model.register_forward_pre_hook(pulse.on_forward).remove)  # each micro-batch is progress
        optimizer, start = settings.optimizer.build(model), Progress(order=data.order)
        state = _Run(model, optimizer, data, settings, folder, world, pulse, start)
        state.group_settings = read_group_settings(state.optimizer)
        resumed = state.restore()
        if state.progress.step == settings.steps:
            log.info("nothing left to train")
            return True
        saver = stack.enter_context(Saver(folder.checkpoints, settings.checkpoint, folder.record(), world, pulse))
        if world.is_first:
            state.metrics = stack.enter_context(MetricLog(folder.path, state.progress.step if resumed else None))
        if not resumed:
            state.log_metrics(0, {}, state.validate(0))
        # Begun after the first validation, which would otherwise count as part of every step in the time that is left.
        slow_start = SlowStart(model, settings.parallel, world, settings.steps - state.progress.step)
        live = stack.enter_context(ProgressLine(settings.steps, state.progress.step, settings.logger.line_every, world))
        reader = stack.enter_context(StepReader(data.steps_from, state.progress, settings.steps, pulse))
        for step in range(state.progress.step + 1, settings.steps + 1):
            state.begun.append(state.begin_step(step, reader.batches, reader.waited))
            # A validation or a checkpoint needs the numbers of this step at once.
            is_needed = state.is_due(step, settings.evaluation.every, settings.checkpoint.every)
            held_out = state.report_steps(live, slow_start, all_of_them=is_needed)
            is_saved = state.is_due(step, settings.checkpoint.every) and state.save(saver, held_out)
            # A rank that wants to stop reads no further, because all ranks stop now.
            _ = stopping.local_code() or reader.read_next()
            stop_reason = stopping.agree_on_stop(world, reader.error is None)
            if stop_reason and not is_saved:
                state.report_steps(live, slow_start, all_of_them=True)
                state.save(saver, held_out)
            if stop_reason and step < settings.steps:
                saver.wait()
                reader.raise_error(world, step)
                log.info("stopped after step %d of %d, %s; it is saved. Run the same command again to go on.",
                         step, settings.steps, stop_reason)  # fmt: skip
                return False
        if state.metrics:
            state.metrics.end()
        return True
