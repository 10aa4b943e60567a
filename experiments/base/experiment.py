"""`Experiment`: the one place that joins student, data, loss and training. It takes plain values, and no Fiddle.

shards ─► collate ─► Batch ─► student ─► loss ─► one step (optimizer, schedule, parallel) ─► metrics, checkpoint
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.cache.manifest import MANIFEST_FILE, Manifest
from data.storage.storage import is_url
from data.stream.order import ORDER_VERSION
from data.stream.source import count_passes, format_passes
from data.stream.stream import all_batches, training_steps
from data.tokenizer import Tokenizer
from experiments.base import checks
from experiments.base.chat_formats import chat_format
from experiments.base.parts import ExperimentParts, cache_facts
from experiments.base.provenance import input_hashes, student_folders
from experiments.base.unused_settings import unused_settings
from kd_core.files import new_folder_target, sha256
from kd_core.hub import resolve_folder
from kd_core.parallel import engine
from kd_core.parallel.collectives import assert_ranks_agree, run_on_all_ranks
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.huggingface.config_json import warn_of_unloadable
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.student import Student
from kd_core.training.checkpoints.checkpoint import checkpoints_by_metric, load_best
from kd_core.training.evaluation import HeldOutCache
from kd_core.training.generation import Prompts
from kd_core.training.loop import Data, run
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from kd_core.types import Batch

log = logging.getLogger("kd")


def _format_millions(model: Student, *, trained: bool = False) -> str:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)
    return f"{count / 1e6:.1f}M"


@dataclass(frozen=True)
class Experiment(ExperimentParts):
    """A distillation run: checks of its parts, and the training itself."""

    def check(self, ranks: int = 1) -> dict[str, str]:
        """Checks the parts against each other, the caches and `ranks` ranks, and returns what a dry run shows.

        Raises:
            UsageError: parts do not fit each other.
        """
        checks.check(self)
        chat_format(self.shards)  # an unreadable format should not surface after the training
        student = self.build_on_meta()
        checks.check_auxiliary(self.loss, student)
        arch = student.arch
        caches, weights = [part.manifest for part in self.shards.parts], self.evaluation.weights
        held_out = {name: part.manifest.positions for name, part in self.evaluation.caches.items()}
        repeats = count_passes(self.shards, self.collate.row_length, self.seed, self.steps * self.rows_per_step)
        checks.warn_of_repeats(self.steps, repeats)
        checks.warn_of_warmup(self.schedule, self.steps)
        warn_of_unloadable(arch)
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

    def fetch(self) -> None:
        """Downloads all folders that are named by hub ids, before ranks wait for each other.

        Raises:
            UsageError: a folder cannot be downloaded.
        """
        for where, folder in student_folders(self.student).items():
            resolve_folder(folder, where)

    def share_manifests(self, world: World) -> None:
        """Reads manifests and lengths of records on the first rank alone, and gives them to all ranks.

        Otherwise each rank would read the index of every shard at its start. Of a folder, each rank compares its own
        manifest. A URL is the same for all, and blocks are verified against the manifest.

        Raises:
            UsageError: a rank's folder holds another cache.
        """

        def read() -> dict[str, Manifest]:
            for shards in caches.values():
                _ = shards.manifest.lengths  # it is held with the manifest
            return {where: shards.manifest for where, shards in caches.items()}

        caches = {**self.training_caches(), **self.held_out_caches()}
        folders = [shards.path for shards in caches.values() if not is_url(shards.path)]
        hashes = run_on_all_ranks(
            world, lambda: {f"the contents of {path}": sha256(Path(path) / MANIFEST_FILE) for path in folders}
        )
        assert_ranks_agree(world, hashes[world.rank])
        for where, manifest in world.run_on_first(read).items():
            caches[where].use_manifest(manifest)

    def inputs(self) -> dict[str, dict[str, str]]:
        return input_hashes(self)

    def _data(self, world: World, vocab_size: int) -> Data:
        rows = {"rank": world.dp_rank, "ranks": world.dp_size, "row_share": world.row_share}
        share: dict[str, Any] = {**rows, "vocab_size": vocab_size}

        def steps_from(row: int) -> Generator[list[Batch]]:
            return training_steps(
                self.shards, self.collate, seed=self.seed, start_row=row, rows_per_step=self.rows_per_step,
                micro_batch=self.parallel.micro_batch_rows, pin_memory=world.device.type == "cuda", **share,
            )  # fmt: skip

        tokenizer = Tokenizer(resolve_folder(self.student.folder))
        prompts = self._prompts(tokenizer)
        return Data(steps_from, self._held_out(share), tokenizer.byte_lengths(), prompts, ORDER_VERSION)

    def _held_out(self, share: dict[str, Any]) -> dict[str, HeldOutCache]:
        micro_batch, weights = self.parallel.micro_batch_rows, self.evaluation.weights
        return {
            name: HeldOutCache(
                partial(all_batches, part, self.collate, micro_batch=micro_batch, **share),
                cache_facts(part),
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
        self.parallel.choose_kernels()
        model = parallelize(self.build_on_meta(), self.parallel, world)
        self.student.fill(model, self.seed)
        with engine.evaluation(model, self.parallel, world):
            model.check_start()
        if not run(model, self._data(world, model.arch.vocab_size), self, folder, world, stopping=stopping):
            return False
        if self.checkpoint.export == "best":
            self._take_best(folder, model, world)
        chat = chat_format(self.shards)
        save_pretrained(model, folder.export, resolve_folder(self.student.folder), chat=chat, first=world.is_first)
        return True
