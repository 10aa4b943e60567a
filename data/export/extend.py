"""Extension of a pair of caches by new documents. It leaves the shards that are there untouched.

Documents are identified by the content of the windows that the caches hold, not by their names. A file that was
renamed, or whose lines moved, is not added again, but new text under an old name is. A document that was continued
goes to the cache that has its beginning. The beginning is not written again.

During an extension the folder above both caches holds `growth.json` with the number of shards that each had before. An
interrupted extension is therefore continued as the same one. The old manifests stay valid until new ones replace them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.cache.contents import CachedDocuments
from data.cache.manifest import Manifest, read_manifest
from data.export.spool.spool_parts import SPLITS
from data.storage.storage import Storage, child, storage_at
from data.stream.shards import ShardReader
from kd_core.files import MAX_TEXT_BYTES, damage_as_usage_error, json_text, parse_json

GROWTH_FILE = "growth.json"
GROWING_FILE = "growing.json"  # in a cache's folder, the plan by which it is being extended


@dataclass(frozen=True)
class Growth:
    """The manifests of both caches before an extension, by split, and the documents in them."""

    manifests: dict[str, Manifest]
    documents: CachedDocuments


def read_object(storage: Storage, name: str, expected: str) -> dict[str, Any]:
    """Reads a JSON object of an export, which somebody else may have written.

    Raises:
        UsageError: it is missing, or no JSON object.
    """
    return parse_json(storage.read(name, MAX_TEXT_BYTES), storage.url(name), expected)


def write_object(storage: Storage, name: str, value: dict[str, Any]) -> None:
    """Writes a JSON object."""
    storage.write(name, [json_text(value).encode()])


def load_growth(out: Path | str, *, begin: bool) -> Growth:
    """Returns the extension that is under way, or a new one. With `begin` a new one is recorded in `growth.json`.

    Raises:
        UsageError: there are no complete caches to extend.
    """
    now, storage = {split: read_manifest(child(out, split)) for split in SPLITS}, storage_at(out)
    counts = {split: {"plans": len(m.plans), "shards": len(m.shards)} for split, m in now.items()}
    if storage.size(GROWTH_FILE) is not None:
        counts = read_object(storage, GROWTH_FILE, "the state of a growing cache")
    elif begin:
        write_object(storage, GROWTH_FILE, counts)
    # Cut the manifests back to what they were. One of two may already be the extended one, after an interruption.
    with damage_as_usage_error(storage.url(GROWTH_FILE), "the state of a growing cache"):
        before = {
            split: replace(m, plans=m.plans[: counts[split]["plans"]], shards=m.shards[: counts[split]["shards"]])
            for split, m in now.items()
        }
    documents = CachedDocuments()
    for split, manifest in before.items():
        records = ShardReader(child(out, split), manifest).records()
        progress = tqdm(records, f"read {split}", manifest.records, mininterval=1, delay=2, leave=False)
        documents.add(progress, split, is_whole=all(plan.get("tokens", 0) is None for plan in manifest.plans))
    return Growth(before, documents)


def end_growth(out: Path | str) -> None:
    """Removes the state of an extension, after both caches are complete."""
    storage_at(out).delete(GROWTH_FILE)
    for split in SPLITS:
        storage_at(child(out, split)).delete(GROWING_FILE)
