"""Verification of a whole cache: every byte against the manifest, every value against what a teacher can produce.

    manifest → tables → each shard: bytes, hashes, members, records → each block: ids, mass, labels
             → figures of the manifest → windows → leaks from validation → plans → other files in the folder

All problems are collected, not only the first.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.cache.alignment import check_alignment
from data.cache.codec.coding import Coding
from data.cache.codec.header import MAX_NUMBER
from data.cache.columns import Columns
from data.cache.contents import CachedDocuments, record_digest, windows_digest
from data.cache.inspection.scan import DecodedBlock, read_coding, scan_blocks
from data.cache.manifest import MANIFEST_FILE, TABLES_FILE, Manifest, read_manifest
from data.cache.record import UNUSED, Array
from data.cache.totals import Totals
from data.storage.storage import is_url, storage_at
from kd_core.errors import UsageError
from kd_core.files import MAX_TEXT_BYTES, parse_json
from kd_core.json_fields import check_integer, check_object, short_repr

PLAN_FILE = "plan.json"
HALVES = (slice(0, 16), slice(16, 32))
MOST_SHOWN = 1000  # problems that are stored; all others are counted


@dataclass
class Findings:
    """Counts of what was read, and all problems in order. `more` counts problems that are not stored."""

    manifest: Manifest
    records: int = 0
    positions: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    more: int = 0

    def report(self, where: str, problem: str) -> None:
        """Adds a problem."""
        if len(self.problems) < MOST_SHOWN:
            self.problems.append(f"{where}: {problem}")
        else:
            self.more += 1


def verify(folder: Path | str, progress: Callable[[int], object]) -> Findings:
    """Reads a whole cache and returns all problems. Calls `progress` with the positions of each block.

    Raises:
        UsageError: there is no manifest, or it cannot be read.
    """
    manifest = read_manifest(folder)
    findings, totals, digests = Findings(manifest), dict[str, Totals](), dict[str, list[bytes]]()
    documents = _held_out(folder)
    coding = read_coding(folder, manifest, findings.report)
    for decoded in scan_blocks(folder, manifest, coding, findings.report):
        for problem in _problems(decoded, coding, manifest):
            findings.report(decoded.where, problem)
        shard = decoded.where.partition(",")[0]
        if {"kl_mean", "kl_worst", "mass_error"} <= decoded.header.audit.keys():
            totals[shard] = totals.get(shard, Totals()) + Totals.from_block(decoded.header, decoded.records)
        else:
            findings.report(decoded.where, "json: has no audit of the codec")
        findings.records += len(decoded.records)
        findings.positions += decoded.header.positions
        progress(decoded.header.positions)
        digests.setdefault(shard, []).extend(map(record_digest, decoded.records))
    _check_figures(findings, sum(totals.values(), Totals()), manifest)
    _check_indexes(findings, totals, digests)
    # The first 16 bytes of a record's digest are those of its window, the others those of its mask.
    windows, masks = ([digest[half] for shard in digests.values() for digest in shard] for half in HALVES)
    _check_windows(findings, windows, masks)
    if documents and (leaked := documents.among(windows)):
        findings.report("../validation", f"{len(leaked)} of its documents are in train, too: {short_repr(leaked[0])}")
    _check_plans(findings, manifest)
    _check_folder(folder, findings)
    return findings


def _problems(decoded: DecodedBlock, coding: Coding | None, manifest: Manifest) -> Iterator[str]:
    """Yields the problems of a block that could be decoded."""
    header, selection = decoded.header, manifest.selection
    assert coding is not None, "a block is decoded with tables alone"
    if header.first != decoded.first:
        yield f"begins with record {header.first}; there are {decoded.first} before it"
    if header.entries > selection.top_k or header.samples > selection.draws:
        yield f"has {header.entries} entries and {header.samples} samples a position; the selection {selection.words()}"
    if (longest := max(record.positions for record in decoded.records)) > manifest.row_length:
        yield f"has a record of {longest} positions; the manifest's row_length is {manifest.row_length}"
    columns = Columns.from_records(decoded.records, selection.tail_temperatures)
    try:
        columns.check(manifest.vocab_size, selection)
        check_alignment(decoded.records, "alignment")
    except ValueError as error:
        yield str(error)
    for name, ids, logs in (
        ("entries", columns.entry_ids, columns.entry_logs),
        ("samples", columns.samples, columns.sample_logs),
    ):
        if (row := _repeated(ids, logs)) is not None:
            yield f"{name}: position {row} has the same id twice"


def _repeated(ids: Array, logs: Array) -> int | None:
    """Returns the first row that uses an id twice, or None."""
    # Give unused places different negative ids, sort each row, and compare neighbours.  [N, K]
    unused = -1 - np.arange(ids.shape[1])
    ordered = np.sort(np.where(logs > UNUSED, ids, unused), axis=1)
    twice = (np.diff(ordered, axis=1) == 0).any(axis=1)
    return int(twice.argmax()) if twice.any() else None


def _check_figures(findings: Findings, totals: Totals, manifest: Manifest) -> None:
    """Compares the manifest's statistics, audit and counts with those of the blocks."""
    if findings.positions == manifest.positions and totals.positions:
        for difference in totals.differing(manifest.statistics, manifest.audit):
            findings.report("manifest.json", difference)
    elif findings.positions != manifest.positions:
        read = f"{findings.records} records of {findings.positions} positions could be read"
        findings.report("manifest.json", f"says {manifest.records} records of {manifest.positions} positions; {read}")
    if not manifest.shards:
        findings.report("manifest.json", "has no shards")


def _check_indexes(findings: Findings, totals: dict[str, Totals], digests: dict[str, list[bytes]]) -> None:
    """Compares the sums and the sha256 of windows that each index states with the shard's, where all could be read."""
    for shard in findings.manifest.shards:
        found = totals.get(shard.name)
        if not found or found.positions != shard.positions:
            continue
        index = findings.manifest.indexes.of(shard)
        sha256 = windows_digest(digests[shard.name])
        if index.windows_sha256 not in (None, sha256):
            findings.report(
                shard.index_name,
                f"is of windows and loss masks of sha256 {index.windows_sha256[:12]}…; the records' is {sha256[:12]}…",
            )
        if stated := index.totals:
            if stated.positions != found.positions:
                findings.report(
                    shard.index_name, f"sums over {stated.positions} positions; the blocks have {found.positions}"
                )
                continue
            for difference in found.differing(stated.statistics(), stated.audit()):
                findings.report(shard.index_name, difference)


def _check_plans(findings: Findings, manifest: Manifest) -> None:
    """Compares the fields that plans share with the manifest, and reports a plan that is recorded twice."""
    stated = {
        **{name: getattr(manifest, name) for name in ("tokenizer", "row_length", "codec")},
        "selection": json.loads(json.dumps(asdict(manifest.selection))),
        "dtype": manifest.teacher.get("dtype"),
    }
    if len(set(map(_text, manifest.plans))) < len(manifest.plans):
        findings.report("manifest.json", "has a plan twice")
    for plan in manifest.plans:
        for name in sorted(stated.keys() & plan.keys()):
            if plan[name] != stated[name]:
                findings.report(
                    "manifest.json",
                    f"{name} is {short_repr(stated[name])}; that of its plan is {short_repr(plan[name])}",
                )


def _check_windows(findings: Findings, windows: list[bytes], masks: list[bytes]) -> None:
    """Compares the records with the windows and loss masks of the plans. Missing and repeated windows are reported."""
    first = 0
    for number, plan in enumerate(findings.manifest.plans):
        if "windows" not in plan or len(windows) != findings.manifest.records:
            return  # the export predates this field, or unreadable records have been reported already
        try:
            planned = check_object(plan["windows"], "windows", ("number", "sha256"))
            last = first + check_integer(planned["number"], "windows.number", 0, MAX_NUMBER)
        except ValueError as error:
            findings.report("manifest.json", f"plan {number}: {error}")
            return
        if windows_digest(windows[first:last]) != planned["sha256"]:
            findings.report("manifest.json", f"plan {number}: the records are not those of its windows")
        if "windows_masks" in plan and windows_digest(masks[first:last]) != plan["windows_masks"]:
            findings.report("manifest.json", f"plan {number}: the records score other labels than its loss masks")
        first = last


def _ignore(where: str, problem: str) -> None:
    del where, problem


def _held_out(folder: Path | str) -> CachedDocuments | None:
    """Returns the documents of the validation cache beside a training cache, or None where none can be read."""
    above, _, name = str(folder if is_url(str(folder)) else Path(folder).resolve()).rpartition("/")
    validation = f"{above}/validation"
    if name != "train" or storage_at(validation).size(MANIFEST_FILE) is None:
        return None
    documents = CachedDocuments()
    try:
        manifest = read_manifest(validation)
        coding = read_coding(validation, manifest, _ignore)
        decoded_blocks = scan_blocks(validation, manifest, coding, _ignore)
        documents.add(record for decoded in decoded_blocks for record in decoded.records)
    except UsageError:
        return None  # its own verification reports why
    return documents


def _check_folder(folder: Path | str, findings: Findings) -> None:
    """Reports files that do not belong to the cache, and a `plan.json` that is not one of the manifest's plans."""
    storage, manifest = storage_at(folder), findings.manifest
    shard_files = (name for shard in manifest.shards for name in shard.files)
    cache_files = {MANIFEST_FILE, PLAN_FILE, TABLES_FILE, *shard_files}
    try:
        names = storage.names()
    except UsageError:  # a web server does not list its files
        names = []
    for name in names:
        if name not in cache_files:
            findings.report(ascii(name).strip("'"), "does not belong to the cache; the manifest does not name it")
    findings.bytes = manifest.bytes + sum(storage.size(name) or 0 for name in (MANIFEST_FILE, PLAN_FILE))
    if storage.size(PLAN_FILE) is not None:
        try:
            text = storage.read(PLAN_FILE, MAX_TEXT_BYTES)
            plan = parse_json(text, storage.url(PLAN_FILE), "the plan of an export")
        except UsageError as error:
            findings.report(PLAN_FILE, str(error))
            return
        if _text(plan) not in map(_text, findings.manifest.plans):
            findings.report(PLAN_FILE, "is not one of the plans in the manifest")


def _text(plan: object) -> str:
    """Returns a plan as text, for comparison: as Python values, 0 and False would be equal."""
    return json.dumps(plan, sort_keys=True)
