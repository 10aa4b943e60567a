"""A cache that grows: the next export adds the documents that are not in it, and touches no shard that is there.

Documents are known by their content, through the windows that the caches hold, and not by their names: a file that
was renamed, or whose lines moved, is not added again, and new text under an old name is. A document that was continued
goes to the cache that has its beginning, which is not written again.

`growth.json` stands in the folder of both caches while it happens: how many shards each had before, so that an
interrupted growth goes on as the same one. The old manifests stay valid until the new ones take their place.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.cache.contents import CachedDocuments
from data.cache.manifest import Manifest, read_manifest
from data.stream.shards import ShardReader
from kd_core.files import damage_as_usage_error, read_json, write_json

SPLITS = ("train", "validation")
GROWTH = "growth.json"
GROWING = "growing.json"  # the plan by which a cache grows, in its folder


@dataclass(frozen=True)
class Growth:
    """The caches as they were before, by split, and the documents in them."""

    manifests: dict[str, Manifest]
    documents: CachedDocuments


def growth_of(out: Path, *, begin: bool) -> Growth:
    """The growth that is under way, or a new one, which `begin` writes down.

    Raises:
        UsageError: there are no complete caches to grow.
    """
    now = {split: read_manifest(out / split) for split in SPLITS}
    path, was = out / GROWTH, {split: {"plans": len(m.plans), "shards": len(m.shards)} for split, m in now.items()}
    if path.exists():
        was = read_json(path, "the state of a growing cache")
    elif begin:
        write_json(path, was)
    with damage_as_usage_error(path, "the state of a growing cache"):
        before = {
            split: replace(m, plans=m.plans[: was[split]["plans"]], shards=m.shards[: was[split]["shards"]])
            for split, m in now.items()
        }
    documents = CachedDocuments()
    for split, manifest in before.items():
        records = ShardReader(out / split, manifest).records()
        documents.add(tqdm(records, f"read {split}", manifest.records, mininterval=1, delay=2, leave=False), split)
    return Growth(before, documents)


def end_growth(out: Path) -> None:
    """Both caches are complete."""
    for path in (out / GROWTH, *(out / split / GROWING for split in SPLITS)):
        path.unlink(missing_ok=True)
