"""`Experiment`: the one place that joins student, data, loss and training. Plain values in; it does not know Fiddle.

shards ─► collate ─► Batch ─► student ─► loss ─► one step (optimizer, schedule, parallel) ─► metrics, checkpoint
"""

import logging
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial

from data.stream.collate import Collate
from data.stream.source import Mixture, Shards, Source, in_words, passes
from data.stream.stream import all_batches, training_steps
from data.tokenizer import Tokenizer
from experiments.base import checks
from experiments.base.chat_formats import chat_format
from experiments.base.provenance import identities, student_folders
from experiments.base.unused_settings import unused_settings
from kd_core.errors import UsageError
from kd_core.files import new_folder_target
from kd_core.hub import resolve_folder
from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_ranges
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import StudentInit, meta_student
from kd_core.students.student import Student
from kd_core.training.checkpoints.checkpoint import Checkpoint, checkpoints_by_metric, load_best
from kd_core.training.evaluation import HeldOutCache, Metric, metric_names
from kd_core.training.generation import Prompts
from kd_core.training.loop import Data, Recipe, run
from kd_core.training.lr_schedule import Schedule, check_schedule
from kd_core.training.optimizer import Optimizer
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from kd_core.types import Batch

log = logging.getLogger("kd")
NAME = re.compile(r"[\w.-]*$")


@dataclass(frozen=True)
class Logger:
    """How often numbers are written to `metrics.jsonl` and TensorBoard.

    Args:
        every: steps between the numbers of a step.
        line_every: steps between lines of the log, where stderr is no terminal that shows a line that lives.
        histograms_every: steps between histograms of parameters and gradients; 0: none.
    """

    every: int = 1
    line_every: int = 10
    histograms_every: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "logger.", every=AT_LEAST_1, line_every=AT_LEAST_1, histograms_every=AT_LEAST_0)


@dataclass(frozen=True)
class Evaluation:
    """Validation on held-out text: before the first step, every `every` steps, and after the last.

    Args:
        shards: a cache; of several by name, each is reported by itself too, under `val/NAME/`. What stands under
            `val/` itself, where `checkpoint.best_metric` looks by default, is the whole by the weights of a `Mixture`;
            of a dictionary it is the first cache alone, and the others are only reported.
        every: steps.
        prompts: texts that the student continues, greedily, for the reader.
        continuation_tokens: by how many tokens.
        metrics: functions of a `SparseView` of n positions to a number each; `val/NAME` is their mean.
    """

    shards: Shards | Mixture | Mapping[str, Shards]
    every: int = 10
    prompts: tuple[str, ...] = ()
    continuation_tokens: int = 24
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, "evaluation.", every=AT_LEAST_1, continuation_tokens=AT_LEAST_1)
        if not self.caches or not all(isinstance(each, Shards) and NAME.match(at) for at, each in self.caches.items()):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"evaluation.shards: got {dict(self.caches)}; wanted Shards, a Mixture, or a dictionary of Shards by "
                "names of letters, digits, dots, dashes and underscores."
            )

    @property
    def caches(self) -> Mapping[str, Shards]:
        """The caches by name, the main one first; one alone has none."""
        if isinstance(self.shards, Mixture):
            return {name: self.shards.caches[name] for name in sorted(self.shards.caches)}
        return {"": self.shards} if isinstance(self.shards, Shards) else self.shards

    @property
    def weights(self) -> Mapping[str, float]:
        """Returns the weight of each in the numbers of the whole. One of 0 is only reported."""
        if isinstance(self.shards, Mixture):
            return self.shards.weights
        return {name: float(at == 0) for at, name in enumerate(self.caches)}


def caches_of(source: Source | Mapping[str, Shards], where: str) -> dict[str, Shards]:
    """The caches of a source, by their paths in the experiment."""
    if isinstance(source, Mixture):
        return {f"{where}.caches.{name}": source.caches[name] for name in sorted(source.caches)}
    return {where: source} if isinstance(source, Shards) else {f"{where}.{name}": source[name] for name in source}


def _millions(model: Student, *, trained: bool = False) -> str:
    count = sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)
    return f"{count / 1e6:.1f}M"


@dataclass(frozen=True)
class Experiment:
    """A distillation run. Every part is named once, here; nothing else reaches what is trained."""

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
        check_ranges(self, "", steps=AT_LEAST_1, seed=AT_LEAST_0)
        if self.tokens_per_step < length or self.tokens_per_step % length:
            raise UsageError(
                f"tokens_per_step: got {self.tokens_per_step}; wanted a multiple of collate.row_length {length}."
            )
        check_schedule(self.schedule, self.steps)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step, over all ranks."""
        return self.tokens_per_step // self.collate.row_length

    def training_caches(self) -> dict[str, Shards]:
        """The caches that are trained on, by their paths in the experiment."""
        return caches_of(self.shards, "shards")

    def held_out_caches(self) -> dict[str, Shards]:
        """The caches of validation, by their paths in the experiment."""
        return caches_of(self.evaluation.shards, "evaluation.shards")

    def build_on_meta(self) -> Student:
        """The student without memory; its real vocabulary is that of its tokenizer."""
        return meta_student(self.student, Tokenizer(resolve_folder(self.student.folder)).vocab_size)

    def check(self, ranks: int = 1) -> dict[str, str]:
        """Check the parts against each other, the caches and so many ranks; returns what a dry run shows.

        Raises:
            UsageError: parts that do not fit.
        """
        checks.check(self)
        chat_format(self.shards)  # rather than once all is trained
        student = self.build_on_meta()
        arch = student.arch
        caches = [part.manifest for part in self.shards.parts]
        held_out = {name: part.manifest.positions for name, part in self.evaluation.caches.items()}
        weights = self.evaluation.weights
        repeats = passes(self.shards, self.collate.row_length, self.seed, self.steps * self.rows_per_step)
        checks.warn_of_repeats(self.steps, repeats)
        return {
            "student": f"{_millions(student)} parameters ({_millions(student, trained=True)} trained), "
            f"{arch.num_layers} layers, vocabulary {arch.vocab_size}"
            + (f" in {arch.vocab_rows} rows" if arch.vocab_rows > arch.vocab_size else ""),
            "training cache": " + ".join(f"{cache.records} records, {cache.positions} positions" for cache in caches),
            "validation cache": ", ".join(
                f"{positions} positions{f' of {name}' if name else ''}{'' if weights[name] else ' (only reported)'}"
                for name, positions in held_out.items()
            ),
            "a step": f"{self.tokens_per_step} positions in {self.rows_per_step} rows of {self.collate.row_length}",
            "the run": f"{self.steps} steps, {self.steps * self.tokens_per_step} positions, {in_words(repeats)}",
            **checks.check_layout(self, student, ranks),
        }

    def unused(self) -> list[str]:
        """A sentence for each setting that changes nothing in this run."""
        return unused_settings(self)

    def validation_metrics(self) -> set[str]:
        """Names of the numbers that validation gives, known before anything runs: of the whole, and of each cache."""
        names = {
            cache: metric_names(self.loss, checks.cache_facts(part), self.evaluation.metrics)
            for cache, part in self.evaluation.caches.items()
        }
        found = set.intersection(*(names[cache] for cache, weight in self.evaluation.weights.items() if weight))
        for cache, own in names.items() if len(names) > 1 else ():
            found |= {name.replace("val/", f"val/{cache}/") for name in own}
        return found

    def fetch(self) -> None:
        """Have all that hub ids name on this machine, before ranks wait for each other.

        Raises:
            UsageError: the hub does not give it.
        """
        for where, folder in student_folders(self.student).items():
            resolve_folder(folder, where)

    def inputs(self) -> dict[str, dict[str, str]]:
        """Path and sha256 of all that the run reads, for its record."""
        return identities(self)

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
        """A prompt begins as the texts of the caches do."""
        texts = self.evaluation.prompts
        begins = next(
            (part.manifest.text_begins_with for part in self.shards.parts if part.manifest.text_begins_with), []
        )
        ids = [[*begins, *ids] for ids in tokenizer.encode(texts)]
        return Prompts(texts, ids, self.evaluation.continuation_tokens, tokenizer.decode)

    def _take_best(self, folder: RunFolder, model: Student, world: World) -> None:
        """Load the best checkpoint for the export. The last step stays where none has a finite metric."""
        metric = self.checkpoint.best_metric
        if world.run_on_first(lambda: bool(checkpoints_by_metric(folder.checkpoints, self.checkpoint))):
            best = load_best(folder.checkpoints, self.checkpoint, model, world)
            log.info("export: of %s, the best %s", best.name, metric)
        else:
            log.warning(
                "export: of the last step, for no checkpoint has a finite %s, by which checkpoint.export=best knows "
                "the best. Look at %s in metrics.jsonl, or set checkpoint.best_metric.", metric, metric,
            )  # fmt: skip

    def run(self, folder: RunFolder, world: World, stopping: StopSignals) -> bool:
        """Train, or go on training, in `folder`; then export the student. A finished run is left as it is.

        False where it was told to stop before the end; what is done is saved then.
        """
        if world.run_on_first(lambda: folder.is_finished):
            log.info("%s: already complete, reused", folder.path)
            return True
        world.run_on_first(lambda: new_folder_target(folder.export))  # rather than once all is trained
        recipe = Recipe(
            loss=self.loss,
            optimizer=self.optimizer,
            schedule=self.schedule,
            parallel=self.parallel,
            checkpoint=self.checkpoint,
            steps=self.steps,
            seed=self.seed,
            rows_per_step=self.rows_per_step,
            tokens_per_step=self.tokens_per_step,
            log_every=self.logger.every,
            line_every=self.logger.line_every,
            histograms_every=self.logger.histograms_every,
            evaluate_every=self.evaluation.every,
            metrics=self.evaluation.metrics,
        )
        world = world.with_layout(self.parallel.layout(world.size))
        checks.warn_of_layout(self.rows_per_step, world.dp_size)
        model = parallelize(self.build_on_meta(), self.parallel, world)
        self.student.fill(model, self.seed)
        if not run(model, self._data(world, model.arch.vocab_size), recipe, folder, world, stopping=stopping):
            return False
        if self.checkpoint.export == "best":
            self._take_best(folder, model, world)
        chat = chat_format(self.shards)
        save_pretrained(model, folder.export, resolve_folder(self.student.folder), chat=chat, first=world.is_first)
        return True
