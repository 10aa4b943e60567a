"""The pass over a corpus that fills a spool.

rows ─ encode, in processes ─► documents ─ split, draw ─► parts of windows

A corpus of at most `HEAD_BYTES` is drawn from as a whole. Of a longer one, the first texts give the rates of the draw,
and each document after them is decided by itself. Then scoring begins while the pass goes on, in another process.
"""

import itertools
import logging
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from data.cache.contents import CachedDocuments
from data.corpus.bad_rows import BadRows
from data.corpus.corpus_sizes import estimate_bytes
from data.corpus.encoding import Encoded
from data.corpus.row_encoding import EncodedRows, EncodingFacts, RowBatch, RowEncoder, row_batches
from data.corpus.windows import Window
from data.export.spool.draw import NewDocuments, StreamDraw, StreamedDraw, draw_exactly, largest_token
from data.export.spool.pass_state import PassState, part_states
from data.export.spool.spool import BEGIN_FILE, END_FILE, FAILED_FILE
from data.export.spool.spool_parts import SPLITS, part_path, write_part
from data.text_lines import BadRowError
from data.worker_processes import worker_processes
from kd_core.files import read_json, write_json
from kd_core.students.decoder.architecture import too_many_tokens

if TYPE_CHECKING:
    from data.export.teacher_export import TeacherExport

log = logging.getLogger("kd")
HEAD_BYTES = 1 << 24  # of a corpus, that are tokenised within some 15 seconds on a core
# Of the corpus, that are tokenised here before processes are started: those take a second.
LOCAL_BYTES = 1 << 20
PART_POSITIONS, PART_BYTES = 1 << 20, 1 << 26  # a part ends at so many positions, or bytes of the corpus
MOST_PROCESSES = 32


def _describe(batch: RowBatch) -> str:
    where = batch.rows[0].where if batch.rows else "an empty file"
    return f"{where}: the process that tokenized the rows from here on"


def encode_rows(encoder: RowEncoder, batches: Iterator[RowBatch]) -> Generator[EncodedRows]:
    """Yields batches of rows as tokens, in order. The first ones are encoded here, those after them in processes."""
    size = 0
    for batch in batches:
        yield encoder.encode(batch)
        size += batch.bytes
        if size >= LOCAL_BYTES:
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (first := next(batches, None)) is not None:
        with worker_processes(encoder.encode, _describe, min(MOST_PROCESSES, cores) if cores > 1 else 0) as encode:
            yield from encode(itertools.chain([first], batches))


class Limits(NamedTuple):
    """The number of a teacher's tokens, and of the positions that it can read, if that is bounded."""

    vocab_size: int
    positions: int | None


class SpoolPass:
    """One pass over the corpus of an export. It fills a spool, or goes on where an earlier one was interrupted."""

    def __init__(
        self, export: "TeacherExport", teacher: Path, limits: Limits, spool: Path, bad_rows: BadRows,
        cached: CachedDocuments | None = None,
    ) -> None:  # fmt: skip
        """Reads what the spool has.

        Args:
            export: the settings.
            teacher: the folder of the tokenizer.
            limits: of the teacher.
            spool: the folder to fill, which this process owns.
            bad_rows: collects rows that cannot be used.
            cached: the documents of caches that are extended.
        """
        self.export, self.teacher, self.limits, self.spool = export, teacher, limits, spool
        self.bad_rows, self.cached = bad_rows, cached
        self.news = NewDocuments(export, cached) if cached is not None else None
        self.total, self.parts = PassState(), 0
        self._delta = PassState()  # what was done since the last part
        self._windows: dict[str, list[Window]] = {split: [] for split in SPLITS}
        (spool / FAILED_FILE).unlink(missing_ok=True)
        if cached is not None and not self.is_complete:
            # What is new is compared with all documents before it, so an extension begins at the first.
            for path in [spool / BEGIN_FILE, *spool.glob("*.part")]:
                path.unlink(missing_ok=True)
        for state in part_states(spool):
            self.bad_rows.merge(state.rows, state.bad)
            self.total.add(state)
            self.parts += 1

    @property
    def is_complete(self) -> bool:
        """Returns whether the spool has all windows."""
        return (self.spool / END_FILE).exists()

    def begin(self) -> dict[str, Any]:
        """Reads the first texts, unless an earlier pass did, and returns what they decide.

        A short corpus is complete after it.
        """
        if not (self.spool / BEGIN_FILE).exists():
            for number in range(self.parts):  # an exact draw that was interrupted while it was written
                part_path(self.spool, number).unlink()
            self.total, self.parts = PassState(), 0
            self.bad_rows.clear()
            self._read_head()
        return read_json(self.spool / BEGIN_FILE, "the beginning of a spool")

    def _read_head(self) -> None:
        head, size = list[EncodedRows](), 0
        with closing(self._encoded(None)) as rows:
            for batch in rows:
                head.append(batch)
                size += batch.bytes
                if size > HEAD_BYTES:
                    break
            else:
                self._draw_exactly(head)
                return
        facts = EncodingFacts()
        for batch in head:
            facts.add(batch.facts)
        positions = sum(len(document.loss_mask) for batch in head for document in batch.documents)
        estimated = round(positions / size * max(size, estimate_bytes(self.export.corpus.files())))
        share = self.export.validation_share
        estimates = {"train": round(estimated * (1 - share)), "validation": round(estimated * share)}
        rules = StreamDraw.from_estimates(self.export, estimates)
        if min(rules.rates.values()) < 1:
            log.info(
                "corpus %s: about %d positions, by its first %d MB; windows are drawn at rates of %s",
                self.export.corpus.path, estimated, size >> 20, rules.rates,
            )  # fmt: skip
        begin = {"estimates": estimates, "rates": rules.rates, "facts": facts.to_json()}
        self._stream(head, rules)
        # The head is streamed as a whole or again from its start: behind it, documents that give no window are skipped.
        write_json(self.spool / BEGIN_FILE, begin)

    def _draw_exactly(self, head: list[EncodedRows]) -> None:
        documents = list[Encoded]()
        for batch in head:
            self._count(batch)
            documents.extend(self._fitting(batch.documents))
        self.bad_rows.finish(self.export.corpus.path)
        if self.news:
            documents = list(self.news.keep(documents))
        drawn = draw_exactly(self.export, documents, self.cached)
        for split in SPLITS:
            self._delta.drawn_from[split] = drawn[split].drawn_from
            for window in drawn[split].windows:
                self._take(split, window)
                if self._positions() >= PART_POSITIONS:
                    self._write_part()
        self._write_part()
        self._end()
        write_json(self.spool / BEGIN_FILE, {"facts": self.total.facts.to_json()})

    def finish(self) -> None:
        """Reads the rest of a long corpus.

        Raises:
            UsageError: the corpus cannot be read on, or has too many bad rows. What is in the spool stays there.
        """
        begin = self.begin()
        if self.is_complete:
            return
        step = self.export.row_length - self.export.overlap
        rules = StreamDraw(self.export.seed, self.export.validation_share, begin["rates"], step)
        # In an extension every document is tokenised, to compare its windows with those of the caches.
        with closing(self._encoded(None if self.cached is not None else rules)) as rows:
            self._stream(rows, rules)
        self.bad_rows.finish(self.export.corpus.path)
        self._end()

    def _encoded(self, rules: StreamDraw | None) -> Generator[EncodedRows]:
        encoder = RowEncoder(self.teacher, self.export.corpus, rules)
        rows = encode_rows(encoder, row_batches(self.export.corpus, self.total.place))
        size = estimate_bytes(self.export.corpus.files())
        with (
            tqdm(total=size, initial=self.total.bytes, unit="B", unit_scale=True, desc="tokenize", mininterval=1,
                 delay=2, leave=False) as bar,
            closing(rows),
        ):  # fmt: skip
            for batch in rows:
                bar.update(batch.bytes)
                yield batch

    def _stream(self, rows: Iterable[EncodedRows], rules: StreamDraw) -> None:
        draw = StreamedDraw(self.export, rules, self.cached, dict(self.total.taken))
        for batch in rows:
            self._count(batch)
            documents = self._fitting(batch.documents)
            for document in self.news.keep(documents) if self.news else documents:
                split, windows, drawn_from = draw.windows(document)
                self._delta.drawn_from[split] += drawn_from
                for window in windows:
                    self._take(split, window)
            if self._positions() >= PART_POSITIONS or self._delta.bytes >= PART_BYTES:
                self._write_part()
        self._write_part()

    def _count(self, batch: EncodedRows) -> None:
        self.bad_rows.merge(batch.rows, batch.bad)
        counts = batch.bytes, batch.rows, batch.left_out, len(batch.documents), batch.bad, batch.facts
        self._delta.add(PassState(batch.behind, *counts))

    def _fitting(self, documents: Iterable[Encoded]) -> Iterator[Encoded]:
        """Yields documents but those whose teacher reads another context, where that or they are too long."""
        for document in documents:
            if problem := self._misfit(document):
                message = f"{document.name}: has a teacher_prompt, and {problem}. Shorten the row, or drop it."
                self.bad_rows.add(document.name, BadRowError(message, "too long for its teacher_prompt"))
                self._delta.bad.append(self.bad_rows.bad[-1])
            else:
                yield document

    def _misfit(self, document: Encoded) -> str | None:
        """Describes why a document with a context for the teacher cannot be scored, or returns None."""
        positions, limit = len(document.loss_mask), self.limits.positions
        if document.context is None:
            return None
        if positions > self.export.row_length:
            return f"{positions} positions; a window has {self.export.row_length} (row_length) and cannot cut it"
        read = len(document.context) + positions - int(document.loss_mask.argmax()) - 1
        return (
            f"{read} positions for the teacher, whose context is {limit}"
            if limit is not None and read > limit
            else None
        )

    def _take(self, split: str, window: Window) -> None:
        if (largest := largest_token([window])) >= self.limits.vocab_size:
            raise too_many_tokens(largest + 1, self.limits.vocab_size, str(self.teacher), "teacher")
        self._windows[split].append(window)
        self._delta.taken[split] += window.positions

    def _positions(self) -> int:
        return sum(self._delta.taken.values())

    def _write_part(self) -> None:
        write_part(self.spool, self.parts, self._windows, self._delta.to_json())
        self.total.add(self._delta)
        self.parts += 1
        self._delta, self._windows = PassState(self.total.place), {split: [] for split in SPLITS}

    def _end(self) -> None:
        total = {**self.total.to_json(), "bad": [], "skipped": self.bad_rows.counts()}
        write_json(self.spool / END_FILE, total)
        path, left_out = self.export.corpus.path, self.total.left_out
        if left_out:
            log.info(
                "corpus %s: %d of %d documents left out: nothing to score (less than two tokens, or no assistant's "
                "turn)",
                path, left_out, left_out + self.total.documents,
            )  # fmt: skip
        if self.total.facts.doubled:
            log.warning(
                "corpus %s: %d texts begin with the BOS themselves and get a second one; corpus.bos=no adds none",
                path, self.total.facts.doubled,
            )  # fmt: skip
        if self.news:
            self.news.log()
