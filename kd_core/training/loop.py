"""The loop: from the newest checkpoint, or from the start, to the last step.

    batches of a step → train_step → metrics → (validation) → (checkpoint)

Everything that varies with the step (learning rate, random state, rows read) is a function of it, so a run that
was killed and resumed computes what it would have computed.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from kd_core.errors import NonFiniteError
from kd_core.losses.objective import Objective
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
from kd_core.training.step import StepSums, train_step
from kd_core.types import Batch

log = logging.getLogger("kd")


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


@dataclass(frozen=True)
class Data:
    """Where batches come from: `steps_from(rows)` yields a step's micro-batches, `validation()` all held-out ones."""

    steps_from: Callable[[int], Iterator[Sequence[Batch]]]
    validation: Callable[[], Iterable[Batch]]


def _due(step: int, every: int, last: int) -> bool:
    return step == last or step % every == 0


def _restore(model: Decoder, optimizer: torch.optim.Optimizer, folder: RunFolder, world: World) -> Progress | None:
    newest = world.on_first(lambda: checkpoint.newest(folder.checkpoints))
    if newest is None:
        return None
    progress = checkpoint.load(newest, model, optimizer)
    log.info("resumed from %s: step %d is done", newest, progress.step)
    return progress


def _take_step(
    model: Decoder, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], recipe: Recipe, world: World
) -> StepSums:
    return train_step(model, optimizer, batches, recipe.loss, recipe.optimizer, recipe.parallel, world)


def _report_non_finite(
    error: NonFiniteError, step: int, batches: Sequence[Batch], folder: RunFolder, world: World
) -> NonFiniteError:
    names = [name for batch in batches for name in batch.record_names]
    write_failed_batch(folder.path, step, names, str(error))
    return NonFiniteError(
        f"step {step}: {error}. The optimiser has not moved. Records of the step on rank {world.rank}: "
        f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''} (all in failed_step_{step}.json). "
        "Look at them, lower optimizer.lr, or run parallel.precision=float32; the last checkpoint is kept."
    )


def run(model: Decoder, data: Data, recipe: Recipe, folder: RunFolder, world: World) -> dict[str, float]:
    """Train to `recipe.steps`; returns the last validation's numbers (`val/…`).

    Raises:
        NonFiniteError: loss or gradient was not finite; nothing was saved for that step.
    """
    optimizer = recipe.optimizer.build(model)
    restored = _restore(model, optimizer, folder, world)
    progress = restored or Progress()
    metrics = MetricLog(folder.path, restored.step if restored else None) if world.is_first else None
    held_out: dict[str, float] = {}

    def validate(step: int) -> dict[str, float]:
        found = evaluate(model, data.validation(), recipe.loss, recipe.parallel, world)
        log.info("step %d: %s", step, ", ".join(f"{k[4:]} {v:.4f}" for k, v in found.items() if k in SHOWN))
        return found

    if restored is None and metrics is not None:
        metrics.add(0, held_out := validate(0))
    elif restored is None:
        held_out = validate(0)
    bar = tqdm(total=recipe.steps, initial=progress.step, unit="step", desc="distil", mininterval=1, disable=not world.is_first)
    batches_of = data.steps_from(progress.rows)
    with bar:
        for step in range(progress.step + 1, recipe.steps + 1):
            started = time.perf_counter()
            batches = next(batches_of)
            torch.manual_seed(recipe.seed * 1_000_003 + step * 1_009 + world.rank)
            lr = recipe.optimizer.lr * recipe.schedule.factor(step, recipe.steps)
            set_lr(optimizer, lr)
            try:
                result = _take_step(model, optimizer, batches, recipe, world)
            except NonFiniteError as error:
                raise _report_non_finite(error, step, batches, folder, world) from None
            values = per_token("train", result.sums, result.tokens)
            seconds = time.perf_counter() - started
            values |= {"train/lr": lr, "train/grad_norm": result.grad_norm}
            values |= {"speed/tokens_per_second": result.tokens / seconds, "speed/step_seconds": seconds}
            bar.set_postfix(loss=f"{values['train/loss']:.3f}", tok_s=f"{values['speed/tokens_per_second']:.0f}", refresh=False)
            bar.update()
            evaluates = _due(step, recipe.evaluate_every, recipe.steps)
            if evaluates:
                held_out = validate(step)
                values |= held_out
            if metrics is not None and (evaluates or _due(step, recipe.log_every, recipe.steps)):
                metrics.add(step, values)
            progress = replace(progress, step=step, rows=progress.rows + recipe.rows_per_step, metric=None)
            if _due(step, recipe.checkpoint.every, recipe.steps):
                metric = held_out.get(recipe.checkpoint.best_metric) if evaluates else None
                progress = replace(progress, metric=metric)
                checkpoint.save(folder.checkpoints, progress, model, optimizer, world)
                world.on_first(lambda: checkpoint.keep_some(folder.checkpoints, recipe.checkpoint))
    return held_out


SHOWN = ("val/loss", "val/nll", "val/kl", "val/top1_agreement")
