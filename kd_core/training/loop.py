"""The loop: from the newest checkpoint, or from the start, to the last step.

    batches of a step → train_step → (validation) → metrics → (checkpoint)

Everything that varies with the step (learning rate, random state, rows read) is a function of it, so a run that
was killed and resumed computes what it would have computed.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from tqdm import tqdm

from kd_core.errors import NonFiniteError
from kd_core.losses.objective import CacheFacts, Objective
from kd_core.parallel.mesh import World
from kd_core.parallel.plan import Parallel
from kd_core.students.decoder import Decoder
from kd_core.training import checkpoint
from kd_core.training.checkpoint import Checkpoint, Progress
from kd_core.training.evaluation import evaluate
from kd_core.training.metrics import MetricLog, per_token
from kd_core.training.optimizer import AdamW, set_lr
from kd_core.training.run_folder import RunFolder, write_failed_batch
from kd_core.training.schedule import WarmupCosine
from kd_core.training.step import train_step
from kd_core.types import Batch

log = logging.getLogger("kd")
SHOWN = ("loss", "nll", "kl", "renormalized_kl", "teacher_cross_entropy", "top1_agreement")


@dataclass(frozen=True)
class Recipe:
    """What the loop needs to know of an experiment, each part under its own name."""

    loss: Objective
    optimizer: AdamW
    schedule: WarmupCosine
    parallel: Parallel
    checkpoint: Checkpoint
    steps: int
    seed: int
    rows_per_step: int
    log_every: int
    evaluate_every: int

    def due(self, step: int, every: int) -> bool:
        """Every so many steps, and after the last."""
        return step == self.steps or step % every == 0


@dataclass(frozen=True)
class Data:
    """Where batches come from: `steps_from(rows)` yields a step's micro-batches, `validation()` all held-out ones,
    out of a cache of which `validation_facts` tells what can be scored."""

    steps_from: Callable[[int], Generator[Sequence[Batch]]]
    validation: Callable[[], Iterable[Batch]]
    validation_facts: CacheFacts


@dataclass(frozen=True)
class _Run:
    """What stays the same over a run."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    data: Data
    recipe: Recipe
    folder: RunFolder
    world: World

    def restore(self) -> Progress | None:
        """Load the newest checkpoint, where there is one."""
        newest = self.world.on_first(lambda: checkpoint.newest(self.folder.checkpoints))
        if newest is None:
            return None
        progress = checkpoint.load(newest, self.model, self.optimizer)
        log.info("resumed from %s: %d of %d steps are done", newest, progress.step, self.recipe.steps)
        return progress

    def validate(self, step: int) -> dict[str, float]:
        """Numbers on the held-out cache."""
        recipe = self.recipe
        objective = recipe.loss.at(step, recipe.steps)
        found = evaluate(
            self.model, self.data.validation(), self.data.validation_facts,
            objective=objective, parallel=recipe.parallel, world=self.world,
        )  # fmt: skip
        shown = ", ".join(f"{name} {found[f'val/{name}']:.4f}" for name in SHOWN if f"val/{name}" in found)
        log.info("validation at step %d: %s", step, shown)
        return found

    def take_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step and its numbers."""
        recipe, started = self.recipe, time.perf_counter()
        torch.manual_seed(recipe.seed * 1_000_003 + step * 1_009 + self.world.rank)
        lr = recipe.optimizer.lr * recipe.schedule.factor(step, recipe.steps)
        set_lr(self.optimizer, lr)
        try:
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
            raise self._report(error, step, batches) from None
        seconds = time.perf_counter() - started
        return {
            **per_token("train", result.sums, result.tokens),
            "data/damaged_blocks": float(result.damaged_blocks),
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": result.tokens / seconds,
            "speed/step_seconds": seconds,
        }

    def _report(self, error: NonFiniteError, step: int, batches: Sequence[Batch]) -> NonFiniteError:
        names = [name for batch in batches for name in batch.record_names]
        path = write_failed_batch(self.folder.path, step, self.world.rank, names, str(error))
        return NonFiniteError(
            f"step {step}: {error}. The optimiser has not moved. Records of the step on rank {self.world.rank}: "
            f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''} (all in {path}). Look at them, lower "
            "optimizer.lr, or run with parallel.precision=float32; the last checkpoint is kept."
        )

    def save(self, step: int, held_out: dict[str, float] | None) -> None:
        """A checkpoint after `step`, with the metric by which the best are kept where this step was validated."""
        policy = self.recipe.checkpoint
        metric = held_out[policy.best_metric] if held_out else None
        progress = Progress(step, step * self.recipe.rows_per_step, metric)
        checkpoint.save(self.folder.checkpoints, progress, self.model, self.optimizer, self.world)
        self.world.on_first(lambda: checkpoint.keep_some(self.folder.checkpoints, policy))


def run(model: Decoder, data: Data, recipe: Recipe, folder: RunFolder, world: World) -> None:
    """Train to `recipe.steps`.

    Raises:
        NonFiniteError: loss or gradient was not finite; nothing was saved for that step.
    """
    this = _Run(model, recipe.optimizer.build(model), data, recipe, folder, world)
    restored = this.restore()
    done = restored.step if restored else 0
    if done == recipe.steps:
        log.info("nothing left to train")
        return
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=recipe.steps, initial=done, unit="step", desc="distil", mininterval=1, disable=not world.is_first
            )
        )
        metrics = None
        if world.is_first:
            metrics = stack.enter_context(MetricLog(folder.path, restored.step if restored else None))
        if restored is None:
            held_out = this.validate(0)
            if metrics:
                metrics.add(0, held_out)
        batches_of = stack.enter_context(closing(data.steps_from(restored.rows if restored else 0)))
        for step in range(done + 1, recipe.steps + 1):
            values = this.take_step(step, next(batches_of))
            held_out = this.validate(step) if recipe.due(step, recipe.evaluate_every) else None
            counts = values["data/damaged_blocks"] > 0  # is never left out, so that the lines add up
            if metrics and (held_out or counts or recipe.due(step, recipe.log_every)):
                metrics.add(step, {**values, **(held_out or {})})
            if recipe.due(step, recipe.checkpoint.every):
                this.save(step, held_out)
            shown = {"loss": f"{values['train/loss']:.3f}", "tok/s": f"{values['speed/tokens_per_second']:.0f}"}
            bar.set_postfix(shown, refresh=False)
            bar.update()
