"""Checks that an experiment's parts fit each other, made before anything is trained. Each failure is one message."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from data.storage.storage import is_url
from data.stream.source import CachePasses, Shards
from data.tokenizer import Tokenizer
from experiments.base.parts import ExperimentParts, cache_facts
from experiments.base.provenance import student_folders
from kd_core.errors import UsageError
from kd_core.hub import resolve_folder
from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.layout import StudentSizes, check_divisible, check_row_length
from kd_core.parallel.parallelize import bytes_of_a_step, fullest_rank_holding
from kd_core.precision import dtype_of
from kd_core.students.decoder.architecture import Architecture, too_many_tokens
from kd_core.students.student import Student
from kd_core.training.evaluation import Metric, metric_direction, metric_names
from kd_core.training.lr_schedule import Schedule
from kd_core.training.optimizer import SINGLE_RANK_ONLY, AdamW, TorchOptimizer

log = logging.getLogger("kd")
# Trained on labels, 4 epochs teach about as much as new text, and returns fall fast beyond 16 (arXiv 2305.16264).
EPOCHS, MOST_EPOCHS = 4, 16


def local_caches(experiment: ExperimentParts) -> dict[str, Path]:
    """Returns the folders of all caches on this machine, by the settings that name them."""
    caches = {**experiment.training_caches(), **experiment.held_out_caches()}
    return {f"{where}.path": Path(shards.path) for where, shards in caches.items() if not is_url(shards.path)}


def _check_folders(experiment: ExperimentParts) -> None:
    """Raises one error for all missing folders, so that the user can make them all at once."""
    folders = {
        where: (folder, "an adapter in PEFT's format" if where.endswith(".adapter") else "a Hugging Face folder")
        for where, folder in student_folders(experiment.student).items()
    }
    for where, folder in local_caches(experiment).items():
        folders[where] = (str(folder), "a cache, made by launchers.export_teacher")
    missing = [
        f"{where}: {folder} ({description})"
        for where, (folder, description) in folders.items()
        if not resolve_folder(folder, where).is_dir()
    ]
    if missing:
        raise UsageError(f"no such folder: {'; '.join(missing)}. Create what is missing, or name folders that exist.")


def _check_rows(row_length: int, tokens_per_step: int, caches: dict[str, Shards]) -> None:
    """Raises where a record is longer than a row, because records are never cut."""
    for where, shards in caches.items():
        if shards.manifest.row_length <= row_length:
            continue
        if (longest := int(shards.manifest.lengths.records.max())) > row_length:
            raise UsageError(
                f"collate.row_length: got {row_length}; {where}.path {shards.path} has a record of {longest} "
                f"positions, and records are never cut. Set tag:RowLength={longest} and tokens_per_step="
                f"{max(1, round(tokens_per_step / longest)) * longest} here, or export with "
                f"--config=tag:RowLength={row_length}."
            )


def _check_documents(longest: int | None, caches: dict[str, Shards]) -> None:
    """Raises where a record is longer than the documents up to which the student's angles are the same."""
    for where, shards in caches.items():
        if longest is None or shards.manifest.row_length <= longest:
            continue
        if (record := int(shards.manifest.lengths.records.max())) > longest:
            raise UsageError(
                f"student.folder: its RoPE has other angles in documents of more than {longest} positions, and "
                f"{where}.path {shards.path} has a record of {record}. Export with --config=tag:RowLength={longest}."
            )


def _warn_of_training_data(experiment: ExperimentParts) -> None:
    """Warns where a validation cache is also a training cache, because its metrics measure memorisation."""
    trained = {shards.path: where for where, shards in experiment.training_caches().items()}
    for where, shards in experiment.held_out_caches().items():
        if shards.path in trained:
            log.warning("%s.path is %s.path, %s: validation on training data measures memorisation.",
                        where, trained[shards.path], shards.path)  # fmt: skip


def refuse_taken_names(metrics: Sequence[Metric], loss: Objective, caches: Iterable[Shards]) -> None:
    """Checks that no user's metric has the name of another number.

    Raises:
        UsageError: a name is taken, by the loss's metrics or by another metric of the user.
    """
    user_names = [metric.__name__ for metric in metrics]
    taken = {name.removeprefix("val/") for shards in caches for name in metric_names(loss, cache_facts(shards))}
    if doubles := sorted({name for name in user_names if name in taken or user_names.count(name) > 1}):
        raise UsageError(f"evaluation.metrics: {', '.join(doubles)}: another metric has this name. Rename it.")


def _check_evaluation(experiment: ExperimentParts, tokenizer: Tokenizer, arch: Architecture) -> None:
    evaluation = experiment.evaluation
    for prompt, ids in zip(evaluation.prompts, tokenizer.encode(evaluation.prompts), strict=True):
        if not ids:
            raise UsageError(f"evaluation.prompts: {prompt!r} has no token. Begin with a word.")
        arch.check_length(len(ids) + evaluation.continuation_tokens - 1, "evaluation.prompts")
    refuse_taken_names(evaluation.metrics, experiment.loss, experiment.held_out_caches().values())
    validation_metrics = experiment.validation_metrics()
    if (best := experiment.checkpoint.best_metric) not in validation_metrics:
        raise UsageError(
            f"checkpoint.best_metric: got {best!r}; wanted one of {', '.join(sorted(validation_metrics))}."
        )
    # The direction of a user's metric is not known, so it cannot be checked.
    mode, user_names = experiment.checkpoint.best_mode, {metric.__name__ for metric in evaluation.metrics}
    direction = metric_direction(best) if best.rpartition("/")[2] not in user_names else None
    if experiment.checkpoint.keep_best and direction and mode != direction:
        raise UsageError(
            f"checkpoint.best_mode: got {mode} for {best}, which would keep the worst; wanted {direction}."
        )


def check(experiment: ExperimentParts) -> None:
    """Checks the parts against each other and the files.

    Raises:
        UsageError: parts do not fit each other, or files are missing.
    """
    caches = {**experiment.training_caches(), **experiment.held_out_caches()}
    _check_folders(experiment)
    folder = experiment.student.folder
    tokenizer = Tokenizer(resolve_folder(folder))
    arch = experiment.student.architecture().with_tokens(tokenizer.vocab_size, folder)
    for where, shards in caches.items():
        try:
            if arch.vocab_rows < min(shards.manifest.vocab_size, tokenizer.vocab_size):
                raise too_many_tokens(shards.manifest.vocab_size, arch.vocab_rows, folder, "student.folder")
            shards.check(arch.vocab_size, tokenizer.fingerprint_like(shards.manifest.tokenizer))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    _check_rows(experiment.collate.row_length, experiment.tokens_per_step, caches)
    _check_documents(arch.longest_document, caches)
    for shards in experiment.training_caches().values():
        experiment.loss.check_cache(cache_facts(shards))
    _check_evaluation(experiment, tokenizer, arch)
    _warn_of_training_data(experiment)


def check_auxiliary(loss: Objective, student: Student) -> None:
    """Raises a `UsageError` if a term reads values that the student does not give."""
    names = student.auxiliary_names
    for where, term in loss.auxiliary().items():
        if term.name not in names:
            choices = f"one of {', '.join(names)}" if names else "no such term, as this student has no such values"
            raise UsageError(
                f"loss.terms.{where}.name: got {term.name!r}; wanted {choices}. A student with experts has "
                "router_balance and router_z."
            )


def _check_support(student: Student, parallel: Parallel) -> None:
    """Raises where a student's family has no part that a layout needs."""
    if parallel.context_parallel > 1 and not student.shares_rows:
        raise UsageError(
            f"parallel.context_parallel: got {parallel.context_parallel}; {type(student).__name__} attends to whole "
            "rows. Leave it at 1, and take parallel.shard=full and parallel.recompute=full for long rows."
        )
    if parallel.recompute_budget() is not None and not (student.measures_blocks or parallel.compile):
        raise UsageError(
            f"parallel.recompute: got {parallel.recompute}; costs of blocks of {type(student).__name__} cannot be "
            "measured. Take full or every:N, or set parallel.compile=true, whose graphs have a budget of their own."
        )


def check_layout(experiment: ExperimentParts, student: Student, ranks: int) -> dict[str, str]:
    """Checks the layout of `ranks` ranks for a student on the meta device.

    Returns:
        A description of the layout, and of the rows, parameters and moments of a rank.

    Raises:
        UsageError: the layout does not fit. The message names what would.
    """
    parallel, collate, arch = experiment.parallel, experiment.collate, student.arch
    optimizer = experiment.optimizer
    if ranks > 1 and isinstance(optimizer, TorchOptimizer) and optimizer.cls in SINGLE_RANK_ONLY:
        raise UsageError(
            f"optimizer.cls: {optimizer.cls} runs on one rank only; there are {ranks}. Take another, such as "
            "AdamW8bit, whose moments take 2 bytes a parameter."
        )
    if isinstance(optimizer, AdamW | TorchOptimizer):
        optimizer.check_names(student)
    layout = parallel.layout(ranks)
    longest = collate.row_length if collate.padding == "row_length" else collate.multiple
    T = -(-longest // collate.multiple) * collate.multiple
    check_row_length(layout.context, T)
    sizes = StudentSizes.from_architecture(arch, T // layout.context)
    check_divisible(parallel.tensor_parallel, parallel.sequence_parallel, sizes)
    _check_support(student, parallel)
    holding = fullest_rank_holding(student, layout, parallel.sequence_parallel)
    moments = f" and {holding.optimizer_bytes / 1e9:.3f} GB of moments" if isinstance(optimizer, AdamW) else ""
    rows = -(-experiment.rows_per_step // layout.data)
    passes = -(-rows // parallel.micro_batch_rows)
    if parallel.cuda_graphs and passes > 1:
        # A pass writes its gradients to the memory of the graphs, where the next pass cannot add to them.
        raise UsageError(
            f"parallel.cuda_graphs: got {passes} passes a step of {rows} rows; wanted one. Set "
            f"parallel.micro_batch_rows={rows}, or set it false."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gradients, copies = bytes_of_a_step(holding, layout, parallel, passes, dtype_of(parallel.precision, device))
    return {
        "layout": f"{ranks} ranks: {layout}",
        "a rank": f"at most {rows} rows a step in {passes} passes; holds {holding.parameters / 1e6:.2f}M parameters "
        f"({4 * holding.parameters / 1e9:.3f} GB in float32){moments}. A step adds {gradients / 1e9:.3f} GB of "
        f"gradients and {copies / 1e9:.3f} GB of weights for matmuls, without activations",
    }


def warn_of_repeats(steps: int, cache_passes: Sequence[CachePasses]) -> None:
    """Warns where a run repeats a small cache more often than its text has something new to teach."""
    for cache in cache_passes:
        if cache.times > MOST_EPOCHS:
            log.warning(
                "steps: %d steps go %.0f times through %s, a cache of %d rows. Text repeated more than %d times "
                "is mostly memorised. Set steps=%d, which goes %d times through it (with a lower tokens_per_step where "
                "these are too few), or export more text.", steps, cache.times, cache.shards.path, cache.rows,
                MOST_EPOCHS, max(1, round(steps * EPOCHS / cache.times)), EPOCHS,
            )  # fmt: skip


def warn_of_warmup(schedule: Schedule, steps: int) -> None:
    """Warns where the learning rate rises for more than half of the run."""
    warmup_steps = getattr(schedule, "warmup_steps", 0)
    if 2 * warmup_steps > steps:
        log.warning(
            "schedule.warmup_steps: the learning rate rises for %d of %d steps. Set schedule.warmup_steps=%d, or train "
            "for longer.", warmup_steps, steps, steps // 10,
        )  # fmt: skip


def warn_of_layout(rows_per_step: int, ranks: int) -> None:
    """Warns where data-parallel ranks have nothing to do, or wait for others."""
    if rows_per_step < ranks:
        log.warning(
            "tokens_per_step: a step has %d rows for %d data-parallel ranks; %d of them are idle. Raise it, or start "
            "fewer.", rows_per_step, ranks, ranks - rows_per_step,
        )  # fmt: skip
    elif rows_per_step % ranks:
        log.warning(
            "tokens_per_step: a step has %d rows for %d data-parallel ranks; some wait while others take one row more.",
            rows_per_step, ranks,
        )  # fmt: skip
