"""`Experiment`: the one place that joins student, data, loss and training. Plain values in; it does not know Fiddle.

shards ─► collate ─► Batch ─► student ─► loss ─► one step (optimizer, schedule, parallel) ─► metrics, checkpoint
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.stream.collate import Collate
from data.stream.source import Mixture, Shards, Source, epochs
from data.stream.stream import all_batches, training_steps
from data.tokenizer import Tokenizer
from experiments import checks
from experiments.chat_formats import chat_format
from experiments.identity import identities
from experiments.unused import unused_settings
from kd_core.errors import UsageError
from kd_core.files import place_of_new_folder
from kd_core.losses.objective import Objective
from kd_core.parallel.mesh import World
from kd_core.parallel.plan import Parallel
from kd_core.parallel.sharding import spread
from kd_core.students.decoder import Decoder
from kd_core.students.saving import save_pretrained
from kd_core.students.starts import Start
from kd_core.training.checkpoint import Checkpoint, load_best
from kd_core.training.continuations import Prompts
from kd_core.training.evaluation import HeldOut, Metric, metric_names
from kd_core.training.loop import Data, Recipe, run
from kd_core.training.optimizer import AdamW
from kd_core.training.run_folder import RunFolder
from kd_core.training.schedule import WarmupCosine
from kd_core.training.stopping import Stopping
from kd_core.types import Batch

log = logging.getLogger("kd")


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
        for name, least in (("every", 1), ("line_every", 1), ("histograms_every", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"logger.{name}: got {getattr(self, name)}; wanted at least {least}.")


@dataclass(frozen=True)
class Evaluation:
    """Validation on held-out text: before the first step, every `every` steps, and after the last.

    Args:
        shards: a cache; of several by name, each is reported by itself too, and the whole by their weights.
        every: steps.
        prompts: texts that the student continues, greedily, for the reader.
        continuation_tokens: by how many tokens.
        metrics: functions of a `SparseView` of n positions to a number each; `val/NAME` is their mean.
    """

    shards: Shards | Mixture
    every: int = 10
    prompts: tuple[str, ...] = ()
    continuation_tokens: int = 24
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        for name in ("every", "continuation_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"evaluation.{name}: got {getattr(self, name)}; wanted at least 1.")


def caches_of(source: Source, where: str) -> dict[str, Shards]:
    """The caches of a source, by their paths in the experiment."""
    if isinstance(source, Mixture):
        return {f"{where}.caches.{name}": source.caches[name] for name in sorted(source.caches)}
    return {where: source}


def _millions(model: Decoder, *, trained: bool = False) -> str:
    count = sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)
    return f"{count / 1e6:.1f}M"


@dataclass(frozen=True)
class Experiment:
    """A distillation run. Every part is named once, here; nothing else reaches what is trained."""

    student: Start
    shards: Shards | Mixture
    collate: Collate
    loss: Objective
    optimizer: AdamW
    schedule: WarmupCosine
    parallel: Parallel
    checkpoint: Checkpoint
    logger: Logger
    evaluation: Evaluation
    steps: int
    seed: int
    tokens_per_step: int

    def __post_init__(self) -> None:
        length = self.collate.row_length
        if self.steps < 1:
            raise UsageError(f"steps: got {self.steps}; wanted at least 1.")
        if self.seed < 0:
            raise UsageError(f"seed: got {self.seed}; wanted at least 0.")
        if self.tokens_per_step < length or self.tokens_per_step % length:
            raise UsageError(
                f"tokens_per_step: got {self.tokens_per_step}; wanted a multiple of collate.row_length {length}."
            )
        self.schedule.check(self.steps)

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

    def check(self, ranks: int = 1) -> dict[str, str]:
        """Check the parts against each other, the caches and so many ranks; returns what a dry run shows.

        Raises:
            UsageError: parts that do not fit.
        """
        checks.check(self)
        student = self.student.decoder()  # without memory
        arch = student.arch
        caches, held_out = (
            [part.manifest for part in source.parts] for source in (self.shards, self.evaluation.shards)
        )
        rows = epochs(self.shards, self.collate.row_length, self.seed, self.steps * self.rows_per_step)
        return {
            "student": f"{_millions(student)} parameters ({_millions(student, trained=True)} trained), "
            f"{arch.num_layers} layers, vocabulary {arch.vocab_size}",
            "training cache": " + ".join(f"{cache.records} records, {cache.positions} positions" for cache in caches),
            "validation cache": " + ".join(f"{cache.positions} positions" for cache in held_out),
            "a step": f"{self.tokens_per_step} positions in {self.rows_per_step} rows of {self.collate.row_length}",
            "the run": f"{self.steps} steps, {self.steps * self.tokens_per_step} positions, {rows}",
            **checks.check_layout(self, student, ranks),
        }

    def unused(self) -> list[str]:
        """A sentence for each setting that changes nothing in this run."""
        return unused_settings(self)

    def validation_metrics(self) -> set[str]:
        """Names of the numbers that validation gives, known before anything runs: of the whole, and of each cache."""
        source = self.evaluation.shards
        names = [metric_names(self.loss, checks.cache_facts(part), self.evaluation.metrics) for part in source.parts]
        found = set.intersection(*names)
        if isinstance(source, Mixture) and len(names) > 1:
            for cache, own in zip(sorted(source.caches), names, strict=True):
                found |= {name.replace("val/", f"val/{cache}/") for name in own}
        return found

    def inputs(self) -> dict[str, dict[str, str]]:
        """Path and sha256 of all that the run reads, for its record."""
        return identities(self)

    def _data(self, world: World) -> Data:
        share = {"rank": world.dp_rank, "ranks": world.dp_size}

        def steps_from(row: int) -> Generator[list[Batch]]:
            return training_steps(
                self.shards, self.collate, seed=self.seed, start_row=row, rows_per_step=self.rows_per_step,
                micro_batch=self.parallel.micro_batch_rows, **share,
            )  # fmt: skip

        tokenizer = Tokenizer(Path(self.student.folder))
        return Data(steps_from, self._held_out(share), tokenizer.byte_lengths(), self._prompts(tokenizer))

    def _held_out(self, share: dict[str, int]) -> dict[str, HeldOut]:
        """By the names of a mixture; one cache has none."""
        source, micro_batch = self.evaluation.shards, self.parallel.micro_batch_rows
        weights = source.weights if isinstance(source, Mixture) else {"": 1.0}
        return {
            name: HeldOut(
                partial(all_batches, part, self.collate, micro_batch=micro_batch, **share),
                checks.cache_facts(part),
                weights[name],
            )
            for name, part in zip(sorted(weights), source.parts, strict=True)
        }

    def _prompts(self, tokenizer: Tokenizer) -> Prompts:
        texts = self.evaluation.prompts
        ids = tokenizer.encode(texts)
        return Prompts(texts, ids, self.evaluation.continuation_tokens, tokenizer.decode)

    def run(self, folder: RunFolder, world: World, stopping: Stopping) -> bool:
        """Train, or go on training, in `folder`; then export the student. A finished run is left as it is.

        False where it was told to stop before the end; what is done is saved then.
        """
        if world.on_first(lambda: folder.is_finished):
            log.info("%s: already complete, reused", folder.path)
            return True
        world.on_first(lambda: place_of_new_folder(folder.export))  # rather than once all is trained
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
        world = world.laid_out(self.parallel.layout(world.size))
        checks.warn_of_layout(self.rows_per_step, world.dp_size)
        model = spread(self.student.decoder(), self.parallel, world)
        self.student.fill(model, self.seed)
        if not run(model, self._data(world), recipe, folder, world, stopping=stopping):
            return False
        if self.checkpoint.export == "best":
            best = load_best(folder.checkpoints, self.checkpoint, model, world)
            log.info("export: of %s, the best %s", best.name, self.checkpoint.best_metric)
        chat = chat_format(self.shards)
        save_pretrained(model, folder.export, Path(self.student.folder), chat=chat, first=world.is_first)
        return True
