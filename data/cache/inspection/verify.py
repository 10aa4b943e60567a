"""Is every byte of a cache what its manifest says, and can it be what a teacher said? All that is wrong, not the first.

manifest → tables → every shard's bytes, hashes, members, records → ids, mass, labels → the manifest's own figures
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from data.cache.alignment import check_alignment
from data.cache.codec.coding import Coding
from data.cache.codec.header import MAX_NUMBER
from data.cache.columns import Columns
from data.cache.contents import CachedDocuments, mask_digest, window_digest, windows_digest
from data.cache.inspection.scan import Visited, blocks, read_coding
from data.cache.manifest import TABLES, Manifest, read_manifest
from data.cache.record import UNUSED, Array
from data.cache.totals import Totals
from kd_core.errors import UsageError
from kd_core.files import read_json
from kd_core.json_fields import fields, integer, shown

MOST_SHOWN = 1000  # problems kept in memory


@dataclass
class Findings:
    """What was read, and all that is wrong with it, in order."""

    manifest: Manifest
    records: int = 0
    positions: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    more: int = 0

    def report(self, where: str, what: str) -> None:
        """Note a problem."""
        if len(self.problems) < MOST_SHOWN:
            self.problems.append(f"{where}: {what}")
        else:
            self.more += 1


def verify(folder: Path, progress: Callable[[int], object]) -> Findings:
    """Read everything; `progress` is told the positions of each block that was read.

    Raises:
        UsageError: there is no manifest, or it cannot be read.
    """
    manifest = read_manifest(folder)
    found, totals, windows, masks = Findings(manifest), Totals(), list[bytes](), list[bytes]()
    documents = _held_out(folder)
    coding = read_coding(folder, manifest, found.report)
    for visited in blocks(folder, manifest, coding, found.report):
        for problem in _problems(visited, coding, manifest):
            found.report(visited.where, problem)
        if {"kl_mean", "kl_worst", "mass_error"} <= visited.header.audit.keys():
            totals.add(visited.header, visited.records)
        else:
            found.report(visited.where, "json: has no audit of the codec")
        found.records += len(visited.records)
        found.positions += visited.header.positions
        progress(visited.header.positions)
        windows.extend(window_digest(record.start, record.token_ids) for record in visited.records)
        masks.extend(mask_digest(record.loss_mask) for record in visited.records)
    _compare(found, totals, manifest)
    _check_windows(found, windows, masks)
    if documents and (leaked := documents.among(windows)):
        found.report("../validation", f"{len(leaked)} of its documents are in train, too: {shown(leaked[0])}")
    _check_plans(found, manifest)
    _check_folder(folder, found)
    return found


def _problems(visited: Visited, coding: Coding | None, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a block whose bytes are right."""
    header, selection = visited.header, manifest.selection
    assert coding is not None, "a block is decoded with tables alone"
    if header.first != visited.first:
        yield f"begins with record {header.first}; there are {visited.first} before it"
    if header.entries > selection.top_k or header.samples > selection.draws:
        yield f"has {header.entries} entries and {header.samples} samples a position; the selection {selection.words()}"
    if (longest := max(record.positions for record in visited.records)) > manifest.row_length:
        yield f"has a record of {longest} positions; the manifest's row_length is {manifest.row_length}"
    columns = Columns.of(visited.records, selection.tail_temperatures)
    try:
        columns.check(manifest.vocab_size, selection)
        check_alignment(visited.records, "alignment")
    except ValueError as error:
        yield str(error)
    for name, ids, logs in (
        ("entries", columns.heads, columns.head_logs),
        ("samples", columns.samples, columns.sample_logs),
    ):
        if (row := _repeated(ids, logs)) is not None:
            yield f"{name}: position {row} has the same id twice"


def _repeated(ids: Array, logs: Array) -> int | None:
    """The first row in which a used id stands twice."""
    unused = -1 - np.arange(ids.shape[1])  # all differ
    ordered = np.sort(np.where(logs > UNUSED, ids, unused), axis=1)
    twice = (np.diff(ordered, axis=1) == 0).any(axis=1)
    return int(twice.argmax()) if twice.any() else None


def _compare(found: Findings, totals: Totals, manifest: Manifest) -> None:
    if found.positions == manifest.positions and totals.positions:
        for difference in totals.differing(manifest):
            found.report("manifest.json", difference)
    elif found.positions != manifest.positions:
        read = f"{found.records} records of {found.positions} positions could be read"
        found.report("manifest.json", f"says {manifest.records} records of {manifest.positions} positions; {read}")
    if not manifest.shards:
        found.report("manifest.json", "has no shards")


def _check_plans(found: Findings, manifest: Manifest) -> None:
    """What a plan asked for and the manifest says besides must be the same."""
    said = json.loads(json.dumps(asdict(replace(manifest, shards=(), plans=()))))
    said = {name: said[name] for name in ("tokenizer", "selection", "row_length", "codec")}
    said["dtype"] = manifest.teacher.get("dtype")
    if len(set(map(_text, manifest.plans))) < len(manifest.plans):
        found.report("manifest.json", "has a plan twice")
    for plan in manifest.plans:
        for name in sorted(said.keys() & plan.keys()):
            if plan[name] != said[name]:
                found.report("manifest.json", f"{name} is {shown(said[name])}; that of its plan is {shown(plan[name])}")


def _check_windows(found: Findings, windows: list[bytes], masks: list[bytes]) -> None:
    """Reports plans whose windows or masks are not those of the records: some are missing, or stand there twice."""
    first = 0
    for number, plan in enumerate(found.manifest.plans):
        if "windows" not in plan or len(windows) != found.manifest.records:
            return  # an export of before, or records that cannot be read and have been reported
        try:
            planned = fields(plan["windows"], "windows", ("number", "sha256"))
            last = first + integer(planned["number"], "windows.number", 0, MAX_NUMBER)
        except ValueError as error:
            found.report("manifest.json", f"plan {number}: {error}")
            return
        if windows_digest(windows[first:last]) != planned["sha256"]:
            found.report("manifest.json", f"plan {number}: the records are not those of its windows")
        if "windows_masks" in plan and windows_digest(masks[first:last]) != plan["windows_masks"]:
            found.report("manifest.json", f"plan {number}: the records score other labels than its loss masks")
        first = last


def _ignore(where: str, problem: str) -> None:
    del where, problem


def _held_out(folder: Path) -> CachedDocuments | None:
    """Returns the documents of the held-out cache beside a training cache, where there is one that can be read."""
    beside = folder.parent / "validation"
    if folder.resolve().name != "train" or not (beside / "manifest.json").exists():
        return None
    documents = CachedDocuments()
    try:
        manifest = read_manifest(beside)
        coding = read_coding(beside, manifest, _ignore)
        visits = blocks(beside, manifest, coding, _ignore)
        documents.add(record for visited in visits for record in visited.records)
    except UsageError:
        return None  # verified by itself
    return documents


def _check_folder(folder: Path, found: Findings) -> None:
    """Files that do not belong to the cache, and a plan that is not the manifest's."""
    known = {"manifest.json", "plan.json", TABLES, *(shard.name for shard in found.manifest.shards)}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            found.report(ascii(path.name).strip("'"), "does not belong to the cache; the manifest knows nothing of it")
        elif path.is_file():
            found.bytes += path.stat().st_size
    if (folder / "plan.json").exists():
        try:
            plan = read_json(folder / "plan.json", "the plan of an export")
        except UsageError as error:
            found.report("plan.json", str(error))
            return
        if _text(plan) not in map(_text, found.manifest.plans):
            found.report("plan.json", "is none of the plans in the manifest")


def _text(plan: object) -> str:
    """A plan to compare: to Python, 0 and False are equal."""
    return json.dumps(plan, sort_keys=True)
