"""Plans of an export's caches. They are the same on every rank and at every start.

documents ─ encode, split, draw (planning.py) ─► windows on disk (spool.py) ─► blocks and shards of windows
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data.cache.manifest import PLAN_BEGINS, PLAN_ENDS, Manifest
from data.corpus.bad_rows import BadRows
from data.corpus.encoding import Encoder
from data.corpus.row_encoding import EncodingFacts
from data.export.extend import Growth, write_object
from data.export.planned_shards import PlannedShard, bytes_per_position, plan_shards
from data.export.spool.draw import no_window, wanted_tokens
from data.export.spool.planning import Limits, SpoolPass
from data.export.spool.spool import SpoolWindows
from data.export.spool.spool_folder import remove_spool, spool_folder
from data.export.teacher_export import TeacherExport, choose_batch_rows
from data.storage.storage import Storage, child, storage_at
from data.teacher.choose_scorer import TeacherFacts, read_teacher_facts
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, own_folder, sha256
from kd_core.hub import local_folder
from kd_core.students.huggingface.weights import weight_files

log = logging.getLogger("kd")
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class CachePlan:
    """The plan of one cache. `identity` decides its bytes: the JSON of plan.json, and of a plan in the manifest.

    While a long corpus is tokenised, `identity` lacks what only its end shows, which is in that of `completed`.
    """

    folder: Path | str
    export: TeacherExport
    teacher: TeacherFacts
    windows: SpoolWindows
    identity: dict[str, Any]
    grown_from: Manifest | None = None
    texts: str = ""  # where there are texts, a description of what is added before and after each
    drawn_from: int = 0  # positions that the split has in all, or an estimate of them
    chat: dict[str, Any] | None = None  # the format of conversations, stored in the manifest only

    @cached_property
    def storage(self) -> Storage:
        """Returns the storage of the cache's files."""
        return storage_at(self.folder)

    @property
    def batch_rows(self) -> int:
        """Returns how many windows are scored together."""
        return self.identity["batch_rows"]

    @property
    def is_streamed(self) -> bool:
        """Returns whether windows are planned while the corpus is tokenised."""
        return "draw" in self.identity

    @property
    def expected_positions(self) -> int:
        """Returns how many positions the cache will have, or an estimate of them."""
        if not self.is_streamed:
            return int(self.windows.positions.sum())
        tokens = self.identity["tokens"]
        return self.drawn_from if tokens is None else min(tokens, self.drawn_from)

    @property
    def first_record(self) -> int:
        """Returns the number of the first new record. It follows those of the cache that is extended."""
        return self.grown_from.records if self.grown_from else 0

    def each_shard(self) -> Iterator[PlannedShard]:
        """Yields the shards, as windows appear. Blocks hold up to `block_positions`, shards about `shard_bytes`."""
        settings = self.export
        most = max(1, int(settings.shard_bytes / bytes_per_position(settings.selection, settings.codec)))
        first = len(self.grown_from.shards) if self.grown_from else 0
        return plan_shards(self.windows.each_positions(), settings.block_positions, most, first)

    @cached_property
    def shards(self) -> list[PlannedShard]:
        """Returns all shards. Waits until the corpus is tokenised."""
        return list(self.each_shard())

    def completed(self) -> "CachePlan":
        """Returns the plan with all that its end shows, and writes it to plan.json. Waits for that.

        Raises:
            UsageError: a new cache has no window.
        """
        if not self.is_streamed:
            return self
        end = self.windows.end()
        if not len(self.windows) and not self.grown_from:
            raise no_window(self.export, self.identity["split"])
        skipped = {"skipped": end["skipped"]} if end["skipped"] else {}
        corpus = {"corpus": {**self.identity["corpus"], **skipped}}
        identity = round_trip_json({**self.identity, **corpus, **self.windows.identity()})
        encoder = _encoder(self.export, EncodingFacts.from_json(end["facts"]))
        if not self.grown_from:
            write_object(self.storage, PLAN_FILE, identity)
        split = identity["split"]
        # Where windows are drawn at a rate, documents without any were not tokenised.
        drawn_from = end["drawn_from"][split] if identity["draw"][split] >= 1 else self.drawn_from
        return replace(self, identity=identity, drawn_from=drawn_from, chat=encoder.chat_format())


def _encoder(export: TeacherExport, facts: EncodingFacts) -> Encoder:
    """Returns an encoder that describes documents of which these facts hold."""
    encoder = Encoder(local_folder(export.teacher), export.corpus.bos, export.corpus.eos)
    encoder.used = encoder.around if facts.has_texts else None
    encoder.turn_ends = facts.turn_ends
    if facts.has_chats:
        encoder.read_template(is_plain=False)
        assert encoder.template
        encoder.template.used_for_tools = facts.has_tools
    return encoder


def round_trip_json(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the value as it comes back from JSON, with lists in place of tuples and text keys."""
    return json.loads(json.dumps(value))


def _teacher_facts(export: TeacherExport, folder: Path, tokens: int) -> TeacherFacts:
    """Reads the facts of the teacher. Raises `UsageError` where `top_k` or `row_length` does not fit it."""
    teacher = read_teacher_facts(folder, export.scorer, tokens, export.vllm_settings)
    top_k = export.selection.top_k
    if top_k >= teacher.vocab_size:
        raise UsageError(f"selection.top_k: got {top_k}; the teacher's vocabulary has {teacher.vocab_size} tokens.")
    if teacher.max_positions is not None and export.row_length > teacher.max_positions:
        raise UsageError(f"row_length: got {export.row_length}; the teacher's context is {teacher.max_positions}.")
    return teacher


def _settings(
    export: TeacherExport, folder: Path, teacher: TeacherFacts, encoder: Encoder, bad_rows: BadRows
) -> dict[str, Any]:
    """Returns the part of the plan that both caches share: all that decides what they hold, but split and tokens."""
    skipped = {"skipped": bad_rows.counts()} if bad_rows.bad else {}
    settings = asdict(export)
    # The layout is left out, so that an export can be finished on other machines than it was begun on.
    left_out = ("corpus", "teacher", "train_tokens", "validation_tokens", "spool", "parallel", "max_spread")
    for name in (*left_out, "scorer_url", "vllm"):
        del settings[name]
    return {
        "corpus": {**export.corpus.identity(), **skipped},
        "chat_template": encoder.template.fingerprint() if encoder.template else None,
        "teacher": {
            "weights": content_fingerprint(weight_files(folder)),
            "config": sha256(folder / "config.json"),
            **({"vllm": teacher.engine} if teacher.engine else {}),
        },
        "tokenizer": encoder.tokenizer.fingerprint(),
        **{name: ids for name, ids in zip((PLAN_BEGINS, PLAN_ENDS), encoder.used or (), strict=False) if ids},
        **settings,
        "scorer": teacher.scorer,
        # Only for a teacher with padding columns, which took probability in earlier versions.
        **({"vocab_size": teacher.vocab_size} if teacher.architecture.get("padded_vocab_size") else {}),
    }


def fill_spool(
    export: TeacherExport, spool: Path, growth: Growth | None, bad_rows: BadRows, *, wait: bool
) -> tuple[TeacherFacts, dict[str, Any]]:
    """Tokenises the corpus into a spool, unless it is there. Returns facts of the teacher, and the spool's beginning.

    Raises:
        UsageError: as `make_plans`, or another process fills the spool.
    """
    folder = local_folder(export.teacher)
    encoder = Encoder(folder, export.corpus.bos, export.corpus.eos)
    teacher = _teacher_facts(export, folder, encoder.tokenizer.vocab_size)
    limits = Limits(teacher.vocab_size, teacher.max_positions)
    with own_folder(spool):
        spool_pass = SpoolPass(export, folder, limits, spool, bad_rows, growth.documents if growth else None)
        begin = spool_pass.begin()
        if wait or growth:
            spool_pass.finish()
    return teacher, begin


def make_plans(
    export: TeacherExport, out: Path | str, growth: Growth | None = None, bad_rows: BadRows | None = None, *,
    wait: bool = True,
) -> list[CachePlan]:  # fmt: skip
    """Returns the plans of both caches: reads, tokenizes and splits the corpus, and draws windows. All ranks agree.

    `batch_rows` that is not set becomes that of a CPU. With `growth`, plans hold new documents only, and a cache
    without any has no plan. `bad_rows` collects skipped rows.

    Args:
        wait: tokenise all of a long corpus. Without it, only its beginning is, and `tokenize_beside` does the rest.

    Raises:
        UsageError: corpus, teacher or tokenizer cannot be read or do not fit each other, or no window is left.
    """
    export = replace(export, batch_rows=choose_batch_rows(export, torch.device("cpu")))
    folder = local_folder(export.teacher)
    bad = bad_rows or export.corpus.bad_rows()
    spool = spool_folder(export, folder, out, growth)
    teacher, begin = fill_spool(export, spool, growth, bad, wait=wait)
    facts = EncodingFacts.from_json(begin["facts"])
    is_streamed = "rates" in begin
    encoder = _encoder(export, facts)
    if is_streamed:
        encoder.expect_everything()
    settings = _settings(export, folder, teacher, encoder, BadRows("skip") if is_streamed else bad)
    if is_streamed:
        settings["draw"] = begin["rates"]
    plans: list[CachePlan] = []
    for split, tokens in wanted_tokens(export).items():
        windows = SpoolWindows(spool, split)
        plan = {**settings, "split": split, "tokens": tokens}
        if growth and not len(windows):
            continue
        if not is_streamed:
            plan |= windows.identity()
        drawn_from = begin["estimates"][split] if is_streamed else windows.end()["drawn_from"][split]
        before = growth.manifests[split] if growth else None
        corpus_facts = encoder.describe(), drawn_from, encoder.chat_format()
        plans.append(
            CachePlan(child(out, split), export, teacher, windows, round_trip_json(plan), before, *corpus_facts)
        )
    if not plans:
        remove_spool(spool, out)
    return plans
