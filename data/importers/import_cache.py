"""Import of other systems' caches, in processes side by side, and resumable:

    source ─► chunks ─► processes: records ─► blocks        ─► numbered, into tars ─► processes: read back, checked
               │ the first one: pilot ─► tables                                         │
               ▼                                                                        ▼
             a function of the source and the settings          manifest, with what the source did not state

Chunks, blocks and shards depend on the source and the settings alone, so the bytes are the same with any number of
processes. A shard appears by rename, then a line of `conversion.jsonl` says how far it reaches. After an interruption,
the same command goes on behind the last of these lines.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from data.cache.codec.block import renumber_block
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.indexes.index_files import IndexFiles
from data.cache.manifest import TABLES_FILE, Manifest, made_now
from data.cache.manifest_fields import MAX_TABLES_BYTES
from data.cache.selection import Selection
from data.cache.writer import file_facts, write_shard, write_tables
from data.importers.formats.formats import format_of
from data.importers.import_journal import JOURNAL_FILE, EncodedBlock, Journal, Reached, WrittenShard
from data.importers.import_worker import Worker, WorkerJob, describe_job, group_lines
from data.importers.settings import UNKNOWN, Chunk, ImportSettings, source_files
from data.storage.storage import storage_at
from data.stream.shards import read_tables
from data.worker_processes import MapJobs, worker_processes
from kd_core.errors import UsageError
from kd_core.files import (
    content_fingerprint,
    json_text,
    new_folder_target,
    own_folder,
    printable,
    read_json,
    write_json,
)

BYTES_OF_JSON, BYTES_OF_BINARY = 25, 5  # of an entry, about: an id and a number
PLAN_FILE = "conversion.json"
RunJobs = MapJobs[WorkerJob, list[EncodedBlock] | WrittenShard]


class _Conversion:
    """A conversion into a folder that this process owns."""

    def __init__(self, job: ImportSettings, folder: Path) -> None:
        self.job, self.folder, self.format = job, folder, format_of(job)
        self.facts, self.storage = self.format.facts(job), storage_at(folder)

    def run(self, processes: int) -> Manifest:
        """Writes what is missing of the cache, then its manifest, and returns that."""
        tables_facts, journal = self._tables(), Journal(self.folder)
        selection = self.facts.selection if self.facts else Selection(1)
        worker = Worker(
            self.job, self.folder, Coding(read_tables(self.folder, tables_facts), selection, self.job.codec)
        )
        # More processes than parts of the source would have nothing to do. A single one is this.
        parts = 1 + sum(path.stat().st_size for path in self.files()) // self.job.chunk_bytes
        processes = min(processes, parts) if min(processes, parts) > 1 else 0
        with (
            worker_processes(worker.run, describe_job, processes) as run,
            tqdm(initial=journal.reached.records, unit="record", mininterval=1) as bar,
        ):
            for written in cast(Iterator[WrittenShard], run(self._write_shards(run, journal))):
                bar.update(written.reached.records - journal.reached.records)
                journal.add(written)
        manifest = self._manifest(journal, tables_facts)
        manifest.write(self.storage)
        return manifest

    def _chunks(self) -> Iterator[Chunk]:
        return self.format.chunks(self.job)

    def _tables(self) -> dict[str, Any]:
        """Fits the rank tables on the first block, if they are not there yet, and returns their size and hash."""
        if self.storage.size(TABLES_FILE) is None:
            pilots = ((c, p) for c in self._chunks() for p in group_lines(self.format.lines(c, self.job), self.job))
            chunk, pilot = next(pilots, (None, []))
            if chunk is None:
                raise UsageError(f"{self.job.source}: holds no record.")
            # The tables' size follows the cache's size, which is estimated from the source's bytes.
            widest = max(1, *(line.record.topk_token_ids.shape[1] for line in pilot))
            size = sum(path.stat().st_size for path in self.files())
            about_positions = size // ((BYTES_OF_JSON if chunk.lines else BYTES_OF_BINARY) * widest)
            tables = fit_tables([line.record for line in pilot], self.job.vocab_size, about_positions)
            write_tables(self.storage, tables)
        return file_facts(self.storage.read(TABLES_FILE, MAX_TABLES_BYTES))

    def files(self) -> list[Path]:
        """Returns all files that the cache is a function of.

        Raises:
            UsageError: one of them is missing.
        """
        job = self.job
        flags = (("tokens", job.tokens), ("loss_mask", job.loss_mask), ("compression", job.compression))
        for flag, name in flags:
            if name and not Path(name).is_file():
                raise UsageError(f"--{flag}={printable(Path(name))}: no such file. Correct the path.")
        beside = self.format.files_beside(job)
        files = source_files(job.source, self.format.endings, beside)
        return [*files, *beside, *(Path(name) for _, name in flags if name)]

    def _blocks(self, run: RunJobs, reached: Reached) -> Iterator[tuple[int, int, EncodedBlock]]:
        """Yields blocks with the numbers of their chunk and in it, from where the shards end on."""
        chunks = itertools.islice(self._chunks(), reached.chunks, None)
        for chunk, blocks in enumerate(cast(Iterator[list[EncodedBlock]], run(chunks)), reached.chunks):
            for block, encoded in enumerate(blocks):
                if (chunk, block) >= (reached.chunks, reached.blocks):
                    yield chunk, block, encoded

    def _write_shards(self, run: RunJobs, journal: Journal) -> Iterator[tuple[str, Reached]]:
        """Writes shards of at most `shard_bytes`, or of one larger block, and yields how far each reaches."""
        reached, shard, number = journal.reached, list[bytes](), len(journal.shards)

        def write() -> tuple[str, Reached]:
            name = f"shard-{number:06d}.tar"
            write_shard(self.storage, name, shard)
            return name, reached

        for chunk, block, encoded in self._blocks(run, reached):
            if shard and sum(map(len, shard)) + len(encoded.data) > self.job.shard_bytes:
                yield write()
                shard, number = [], number + 1
            shard.append(renumber_block(encoded.data, reached.records))
            reached = reached.with_block(chunk, block, encoded)
        if shard:
            yield write()

    def _manifest(self, journal: Journal, tables_facts: dict[str, Any]) -> Manifest:
        job, reached, facts = self.job, journal.reached, self.facts
        unknown = reached.unknown | ({"tokenizer"} if job.tokenizer == UNKNOWN else set())
        plan = {
            "source": job.kind,
            "content": content_fingerprint(self.files()),
            "codec": job.codec,
            "tokenizer": job.tokenizer,
            "row_length": reached.longest,
        }
        return Manifest(
            vocab_size=job.vocab_size,
            tokenizer=job.tokenizer,
            teacher=facts.teacher if facts else {"source": job.kind, "weights": UNKNOWN, "dtype": UNKNOWN},
            selection=facts.selection if facts else Selection(top_k=reached.widest),
            row_length=reached.longest,
            codec=job.codec,
            audit=journal.totals.audit(),
            statistics=journal.totals.statistics(),
            tables=tables_facts,
            plans=(plan,),
            shards=tuple(journal.shards),
            unknown=tuple(sorted(unknown)),
            made=made_now(UNKNOWN, [job.source]),
            indexes=IndexFiles(self.folder),
        )

    def claim(self) -> None:
        """Records in the folder what it is made of, or checks that it is this job that it was begun for.

        Raises:
            UsageError: it was begun for another one, or holds something else.
        """
        path = self.folder / PLAN_FILE
        files = [[str(file), (status := file.stat()).st_size, status.st_mtime_ns] for file in self.files()]
        claim = json.loads(json_text({"settings": asdict(self.job), "files": files}))
        if not path.exists():
            write_json(path, claim)
        elif (recorded := read_json(path, "what a conversion was begun for")) != claim:
            settings, old = claim["settings"], recorded.get("settings", {})
            differing = [name for name in settings if settings[name] != old.get(name)] or ["the source's files"]
            raise UsageError(
                f"{self.folder}: holds a conversion that was begun with other settings or files "
                f"({', '.join(differing)}). Run that command again, choose another --out, or delete it."
            )


def import_cache(job: ImportSettings, out: Path, processes: int = 1) -> Manifest:
    """Writes the cache `out` and returns its manifest. After an interruption, the same call goes on.

    Raises:
        UsageError: `out` is something else already, or a row does not fit its format.
    """
    folder = new_folder_target(out)
    present = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if present - {".lock"} and PLAN_FILE not in present:
        raise UsageError(f"{out}: exists already. Choose another --out, or delete it.")
    conversion = _Conversion(job, folder)
    conversion.files()
    with own_folder(folder):
        conversion.claim()
        try:
            manifest = conversion.run(processes)
        except UsageError:
            # Nothing worth keeping is there before the first shard.
            if not any(folder.glob("shard-*.tar")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        # Without its plan the folder counts as complete.
        for name in (PLAN_FILE, JOURNAL_FILE, ".lock"):
            (folder / name).unlink(missing_ok=True)
    return manifest
