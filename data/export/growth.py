"""A cache that grows: the next export adds the documents that are not in it, and touches no shard that is there.

`growth.json` stands in the folder of both caches while it happens: how many shards each had before, so that an
interrupted growth goes on as the same one. The old manifests stay valid until the new ones take their place.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from data.cache.codec.header import Header
from data.cache.manifest import Manifest, read_manifest
from data.cache.tar import read_members
from kd_core.errors import UsageError
from kd_core.files import damaged, open_plain, read_json, write_json

SPLITS = ("train", "validation")
GROWTH = "growth.json"
GROWING = "growing.json"  # the plan by which a cache grows, in its folder


@dataclass(frozen=True)
class Growth:
    """The caches as they were before, by split, and the names of all documents in them."""

    manifests: dict[str, Manifest]
    documents: frozenset[str]


def _documents(folder: Path, manifest: Manifest) -> set[str]:
    """Names of the documents in a cache, from the headers of its blocks."""
    found: set[str] = set()
    for shard in manifest.shards:
        try:
            with open_plain(folder / shard.name, "a shard") as file:
                for block in shard.blocks:
                    for member in read_members(file.read(block.bytes)):
                        if member.name.endswith(".json"):
                            found |= {document for document, _, _ in Header.of(member.payload).records}
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / shard.name}: damaged: {error}. Restore it before the cache grows.") from None
    return found


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
    with damaged(path, "the state of a growing cache"):
        before = {
            split: replace(m, plans=m.plans[: was[split]["plans"]], shards=m.shards[: was[split]["shards"]])
            for split, m in now.items()
        }
    documents = set[str]().union(*(_documents(out / split, manifest) for split, manifest in before.items()))
    return Growth(before, frozenset(documents))


def end_growth(out: Path) -> None:
    """Both caches are complete."""
    for path in (out / GROWTH, *(out / split / GROWING for split in SPLITS)):
        path.unlink(missing_ok=True)
