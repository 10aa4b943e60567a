"""The parts of an experiment, as plain values: what is trained, on what, and how. Nothing here is done with them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from data.stream.collate import Collate
from data.stream.source import Mixture, Shards, Source
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.hub import resolve_folder
from kd_core.losses.objective import CacheFacts, Objective
from kd_core.parallel.config import Parallel
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_settings
from kd_core.students.starts.start import StudentInit, meta_student
from kd_core.students.student import Student
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.evaluation import Metric, metric_names
from kd_core.training.lr_schedule import Schedule, check_schedule
from kd_core.training.optimizer import Optimizer
from kd_core.training.run_settings import Logger

NAME = re.compile(r"[\w.-]*$")


@dataclass(frozen=True)
class Evaluation:
    """Validation on held-out text: before the first step, every `every` steps, and after the last.

    Args:
        shards: a cache, or several by name. Each of several is also reported by itself, under `val/NAME/`. The numbers
            under `val/`, where `checkpoint.best_metric` looks by default, are means by the weights of a `Mixture`. Of a
            dictionary they are those of the first cache, and the others are only reported.
        every: steps between validations.
        prompts: texts that the student continues greedily, for a human reader.
        continuation_tokens: tokens of each continuation.
        metrics: functions from a `SparseView` of n positions to n numbers. `val/NAME` is their mean.
    """

    shards: Shards | Mixture | Mapping[str, Shards]
    every: int = 10
    prompts: tuple[str, ...] = ()
    continuation_tokens: int = 24
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self, "evaluation.", every=AT_LEAST_1, continuation_tokens=AT_LEAST_1)
        if not self.caches or not all(
            isinstance(shards, Shards) and NAME.match(name)  # pyright: ignore[reportUnnecessaryIsInstance]
            for name, shards in self.caches.items()
        ):
            raise UsageError(
                f"evaluation.shards: got {dict(self.caches)}; wanted Shards, a Mixture, or a dictionary of Shards by "
                "names of letters, digits, dots, dashes and underscores."
            )

    @property
    def caches(self) -> Mapping[str, Shards]:
        """Returns the caches by name, the main one first. A single cache has an empty name."""
        if isinstance(self.shards, Mixture):
            return dict(sorted(self.shards.caches.items()))
        return {"": self.shards} if isinstance(self.shards, Shards) else self.shards

    @property
    def weights(self) -> Mapping[str, float]:
        """Returns each cache's weight in the numbers under `val/`. A cache of weight 0 is only reported."""
        if isinstance(self.shards, Mixture):
            return self.shards.weights
        return {name: float(index == 0) for index, name in enumerate(self.caches)}


def caches_by_path(source: Source | Mapping[str, Shards], where: str) -> dict[str, Shards]:
    """Returns the caches of a source, by their paths in the experiment."""
    if isinstance(source, Mixture):
        return {f"{where}.caches.{name}": source.caches[name] for name in sorted(source.caches)}
    return {where: source} if isinstance(source, Shards) else {f"{where}.{name}": source[name] for name in source}


def cache_facts(shards: Shards) -> CacheFacts:
    """Returns the facts of a cache, as it is read, that the losses check."""
    manifest = shards.manifest
    temperatures, tail_known = (1.0, *manifest.selection.tail_temperatures), "tail" not in manifest.unknown
    return CacheFacts(manifest.vocab_size, shards.entries, temperatures, shards.sampled, tail_known)


@dataclass(frozen=True)
class ExperimentParts:
    """Parts of a distillation run. Each is named here once, and nothing else influences what is trained."""

    student: StudentInit
    shards: Shards | Mixture
    collate: Collate
    loss: Objective
    optimizer: Optimizer
    schedule: Schedule
    parallel: Parallel
    checkpoint: Checkpoint
    logger: Logger
    evaluation: Evaluation
    steps: int
    seed: int
    tokens_per_step: int

    def __post_init__(self) -> None:
        length = self.collate.row_length
        check_settings(self, "", steps=AT_LEAST_1, seed=AT_LEAST_0)
        if self.tokens_per_step < length or self.tokens_per_step % length:
            raise UsageError(
                f"tokens_per_step: got {self.tokens_per_step}; wanted a multiple of collate.row_length {length}."
            )
        check_schedule(self.schedule, self.steps)

    @property
    def rows_per_step(self) -> int:
        """Returns the packed rows of an optimiser step, over all ranks."""
        return self.tokens_per_step // self.collate.row_length

    def training_caches(self) -> dict[str, Shards]:
        """Returns the training caches, by their paths in the experiment."""
        return caches_by_path(self.shards, "shards")

    def held_out_caches(self) -> dict[str, Shards]:
        """Returns the validation caches, by their paths in the experiment."""
        return caches_by_path(self.evaluation.shards, "evaluation.shards")

    def build_on_meta(self) -> Student:
        """Returns the student on the meta device. Its real vocabulary is that of its tokenizer."""
        return meta_student(self.student, Tokenizer(resolve_folder(self.student.folder)).vocab_size)

    def validation_metrics(self) -> set[str]:
        """Returns the names of all validation numbers, of the whole and of each cache, before anything runs."""
        names_of = {
            cache: metric_names(self.loss, cache_facts(part), self.evaluation.metrics)
            for cache, part in self.evaluation.caches.items()
        }
        names = set.intersection(*(names_of[cache] for cache, weight in self.evaluation.weights.items() if weight))
        for cache, cache_names in names_of.items() if len(names_of) > 1 else ():
            names |= {name.replace("val/", f"val/{cache}/") for name in cache_names}
        return names
