"""`Experiment`: the one place that joins student, data, loss and training. It takes plain values, and no Fiddle.

shards ─► collate ─► Batch ─► student ─► loss ─► one step (optimizer, schedule, parallel) ─► metrics, checkpoint
"""

import logging
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial

from data.stream.collate import Collate
from data.stream.source import Mixture, Shards, Source, count_passes, format_passes
from data.stream.stream import all_batches, training_steps
from data.tokenizer import Tokenizer
from experiments.base import checks
from experiments.base.chat_formats import chat_format
from experiments.base.provenance import input_hashes, student_folders
from experiments.base.unused_settings import unused_settings
from kd_core.errors import UsageError
from kd_core.files import new_folder_target
from kd_core.hub import resolve_folder
from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_settings
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import StudentInit, meta_student
from kd_core.students.student import Student
from kd_core.training.checkpoints.checkpoint import checkpoints_by_metric, load_best
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.evaluation import HeldOutCache, Metric, metric_names
from kd_core.training.generation import Prompts
from kd_core.training.loop import Data, run
from kd_core.training.lr_schedule import Schedule, check_schedule
from kd_core.training.optimizer import Optimizer
from kd_core.training.run_folder import RunFolder
from kd_core.training.run_settings import Logger
from kd_core.training.stop_signals import StopSignals
from kd_core.types import Batch

log = logging.getLogger("kd")
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


def _format_millions(model: Student, *, trained: bool = False) -> str:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)
    return f"{count / 1e6:.1f}M"


@dataclass(frozen=True)
class Experiment:
    """A distillation run. Every part is named here once, and nothing else influences what is trained."""

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

    def check(self, ranks: int = 1) -> dict[str, str]:
        """Checks the parts against each other, the caches and `ranks` ranks, and returns what a dry run shows.

        Raises:
            UsageError: parts do not fit each other.
        """
        checks.check(self)
        chat_format(self.shards)  # an unreadable format should not surface after the training
        student = self.build_on_meta()
        arch = student.arch
        caches, weights = [part.manifest for part in self.shards.parts], self.evaluation.weights
        held_out = {name: part.manifest.positions for name, part in self.evaluation.caches.items()}
        repeats = count_passes(self.shards, self.collate.row_length, self.seed, self.steps * self.rows_per_step)
        checks.warn_of_repeats(self.steps, repeats)
        return {
            "student": f"{_format_millions(student)} parameters ({_format_millions(student, trained=True)} trained), "
            f"{arch.num_layers} layers, vocabulary {arch.vocab_size}"
            + (f" in {arch.vocab_rows} rows" if arch.vocab_rows > arch.vocab_size else ""),
            "training cache": " + ".join(f"{cache.records} records, {cache.positions} positions" for cache in caches),
            "validation cache": ", ".join(
                f"{positions} positions{f' of {name}' if name else ''}{'' if weights[name] else ' (only reported)'}"
                for name, positions in held_out.items()
            ),
            "a step": f"{self.tokens_per_step} positions in {self.rows_per_step} rows of {self.collate.row_length}",
            "the run": f"{self.steps} steps, {self.steps * self.tokens_per_step} positions, {format_passes(repeats)}",
            **checks.check_layout(self, student, ranks),
        }

    def unused(self) -> list[str]:
        """Returns a sentence for each setting that changes nothing in this run."""
        return unused_settings(self)

    def validation_metrics(self) -> set[str]:
        """Returns the names of all validation numbers, of the whole and of each cache, before anything runs."""
        names_of = {
            cache: metric_names(self.loss, checks.cache_facts(part), self.evaluation.metrics)
            for cache, part in self.evaluation.caches.items()
        }
        names = set.intersection(*(names_of[cache] for cache, weight in self.evaluation.weights.items() if weight))
        for cache, cache_names in names_of.items() if len(names_of) > 1 else ():
            names |= {name.replace("val/", f"val/{cache}/") for name in cache_names}
        return names

    def fetch(self) -> None:
        """Downloads all folders that are named by hub ids, before ranks wait for each other.

        Raises:
            UsageError: a folder cannot be downloaded.
        """
        for where, folder in student_folders(self.student).items():
            resolve_folder(folder, where)

    def inputs(self) -> dict[str, dict[str, str]]:
        return input_hashes(self)

    def _data(self, world: World, vocab_size: int) -> Data:
        share = {"rank": world.dp_rank, "ranks": world.dp_size, "vocab_size": vocab_size}

        def steps_from(row: int) -> Generator[list[Batch]]:
            return training_steps(
                self.shards, self.collate, seed=self.seed, start_row=row, rows_per_step=self.rows_per_step,
                micro_batch=self.parallel.micro_batch_rows, **share,
            )  # fmt: skip

        tokenizer = Tokenizer(resolve_folder(self.student.folder))
        return Data(steps_from, self._held_out(share), tokenizer.byte_lengths(), self._prompts(tokenizer))

    def _held_out(self, share: dict[str, int]) -> dict[str, HeldOutCache]:
        micro_batch, weights = self.parallel.micro_batch_rows, self.evaluation.weights
        return {
            name: HeldOutCache(
                partial(all_batches, part, self.collate, micro_batch=micro_batch, **share),
                checks.cache_facts(part),
                weights[name],
            )
            for name, part in self.evaluation.caches.items()
        }

    def _prompts(self, tokenizer: Tokenizer) -> Prompts:
        """Returns the prompts. They begin with the same tokens as the texts of the caches."""
        texts = self.evaluation.prompts
        begins = next(
            (part.manifest.text_begins_with for part in self.shards.parts if part.manifest.text_begins_with), []
        )
        ids = [[*begins, *ids] for ids in tokenizer.encode(texts)]
        return Prompts(texts, ids, self.evaluation.continuation_tokens, tokenizer.decode)

    def _take_best(self, folder: RunFolder, model: Student, world: World) -> None:
        """Loads the best checkpoint for the export. The last step stays where none has a finite metric."""
        metric = self.checkpoint.best_metric
        if world.run_on_first(lambda: bool(checkpoints_by_metric(folder.checkpoints, self.checkpoint))):
            best = load_best(folder.checkpoints, self.checkpoint, model, world)
            log.info("export: of %s, the best %s", best.name, metric)
        else:
            log.warning(
                "export: of the last step, because no checkpoint has a finite %s, by which checkpoint.export=best "
                "chooses. Look at %s in metrics.jsonl, or set checkpoint.best_metric.", metric, metric,
            )  # fmt: skip

    def run(self, folder: RunFolder, world: World, stopping: StopSignals) -> bool:
        """Trains in `folder`, or resumes there, and exports the student. A finished run is left as it is.

        Returns False where the run was stopped before its end. Its state is saved then.
        """
        if world.run_on_first(lambda: folder.is_finished):
            log.info("%s: already complete, reused", folder.path)
            return True
        world.run_on_first(lambda: new_folder_target(folder.export))  # raises before the training, not after it
        world = world.with_layout(self.parallel.layout(world.size))
        checks.warn_of_layout(self.rows_per_step, world.dp_size)
        model = parallelize(self.build_on_meta(), self.parallel, world)
        self.student.fill(model, self.seed)
        if not run(model, self._data(world, model.arch.vocab_size), self, folder, world, stopping=stopping):
            return False
        if self.checkpoint.export == "best":
            self._take_best(folder, model, world)
        chat = chat_format(self.shards)
        save_pretrained(model, folder.export, resolve_folder(self.student.folder), chat=chat, first=world.is_first)
        return True
