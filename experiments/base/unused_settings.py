"""Warnings of settings that a run would not read. Each is a sentence with the setting's path and the reason."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from data.storage.storage import is_url
from data.stream.source import Shards
from experiments.base.parts import ExperimentParts
from kd_core.losses.objective import Distillation
from kd_core.losses.term_weights import WarmupStableDecay


def _is_changed(part: Any, name: str) -> bool:
    """Returns True where a setting does not have its default."""
    default = next(field.default for field in fields(part) if field.name == name)
    return getattr(part, name) != default


def _unused_storage_settings(where: str, shards: Shards) -> Iterator[str]:
    settings = ("retry_seconds", "block_cache", "block_cache_bytes")
    if is_url(shards.path):
        settings, reason = settings[2:] if shards.block_cache is None else (), f"there is none ({where}.block_cache)"
    else:
        reason = f"{shards.path} is a folder"
    for name in settings:
        if _is_changed(shards, name):
            yield f"{where}.{name}={getattr(shards, name)}: {reason}"


def _unused_in_training_shards(where: str, shards: Shards) -> Iterator[str]:
    selection = shards.manifest.selection
    yield from _unused_storage_settings(where, shards)
    if not shards.prefetch and _is_changed(shards, "timeout"):
        yield f"{where}.timeout={shards.timeout}: nothing is read ahead ({where}.prefetch=0)"
    if shards.on_damage == "stop" and _is_changed(shards, "max_damaged_blocks"):
        yield f"{where}.max_damaged_blocks={shards.max_damaged_blocks}: the first one stops ({where}.on_damage=stop)"
    if 0 < shards.min_prob <= selection.min_prob:
        yield f"{where}.min_prob={shards.min_prob}: {shards.path} holds nothing below {selection.min_prob}"
    if selection.mass <= shards.mass < 1:
        yield f"{where}.mass={shards.mass}: {shards.path} holds no more than {selection.mass}"
    if not shards.samples and not selection.draws:
        yield f"{where}.samples=False: {shards.path} has no samples"


def _unused_in_held_out_shards(where: str, shards: Shards) -> Iterator[str]:
    yield from _unused_storage_settings(where, shards)
    for name in ("on_damage", "max_damaged_blocks", "prefetch", "timeout"):
        if _is_changed(shards, name):
            value = getattr(shards, name)
            yield f"{where}.{name}={value}: validation reads in stored order, not ahead, and skips nothing"


def _unused_in_loss(experiment: ExperimentParts) -> Iterator[str]:
    for name, term in experiment.loss.terms.items():
        where = f"loss.terms.{name}"
        if isinstance(weight := term.weight, WarmupStableDecay):
            ramp_steps = weight.warmup_steps + weight.decay_steps
            if ramp_steps > experiment.steps:
                yield f"{where}.weight: warm-up and decay take {ramp_steps} of {experiment.steps} steps; it never peaks"
        if not isinstance(term, Distillation):
            continue
        at_one = term.temperature == 1 and term.student_temperature in (None, 1)
        if at_one and _is_changed(term, "temperature_scaling"):
            yield f"{where}.temperature_scaling={term.temperature_scaling}: both temperatures are 1"
        if term.keep is not None and term.keep.share == 1:
            yield f"{where}.keep: a share of 1 keeps every position"


def _unused_elsewhere(experiment: ExperimentParts) -> Iterator[str]:
    collate, saved, validated = experiment.collate, experiment.checkpoint, experiment.evaluation
    resets = (collate.reset_position_ids, collate.reset_attention_mask, collate.eod_mask_loss)
    if collate.eod_id is not None and not any(resets):
        yield f"collate.eod_id={collate.eod_id}: nothing restarts at it, and its loss counts"
    if experiment.optimizer.on_non_finite == "stop" and _is_changed(experiment.optimizer, "max_skipped"):
        yield f"optimizer.max_skipped={experiment.optimizer.max_skipped}: the first one stops (optimizer.on_non_finite)"
    for name in ("best_metric", "best_mode"):
        if not saved.keep_best and _is_changed(saved, name):
            yield f"checkpoint.{name}={getattr(saved, name)}: no best is kept (checkpoint.keep_best=0)"
    if not validated.prompts and _is_changed(validated, "continuation_tokens"):
        yield f"evaluation.continuation_tokens={validated.continuation_tokens}: there are no evaluation.prompts"
    if experiment.parallel.tensor_parallel == 1 and experiment.parallel.sequence_parallel:
        yield "parallel.sequence_parallel=True: no ranks share a row (parallel.tensor_parallel=1)"
    first_common_step = math.lcm(saved.every, validated.every)
    if saved.keep_best and first_common_step > experiment.steps and saved.every < experiment.steps:
        yield (
            f"checkpoint.keep_best={saved.keep_best}: no checkpoint but the last is validated (checkpoint.every="
            f"{saved.every}, evaluation.every={validated.every} meet at step {first_common_step}). Set tag:Interval"
        )


def unused_settings(experiment: ExperimentParts) -> list[str]:
    """Returns a sentence for each setting that changes nothing in this run."""
    sentences: list[str] = []
    for where, shards in experiment.training_caches().items():
        sentences += _unused_in_training_shards(where, shards)
    for where, shards in experiment.held_out_caches().items():
        sentences += _unused_in_held_out_shards(where, shards)
    return [
        *sentences,
        *_unused_in_loss(experiment),
        *_unused_elsewhere(experiment),
    ]
