"""What the ranks of a run ask a server for at the start: the first for all indexes, the others for what they read."""

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import fiddle as fdl
import pytest

from data.storage.object_storage import WebStorage
from data.stream.stream import training_steps
from experiments.base.experiment import Experiment
from experiments.config.config_items import resolve_items
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from tests.data.stream.server import serving
from tests.ranks import run_ranks
from tests.tiny import Tiny, write_caches

ROWS = 8  # of the one step that is read


def _start(world: World, items: list[str]) -> None:
    """As `launchers.train` begins, up to the first step."""
    WebStorage.read_ahead = 0  # of a cache as small as this one, it would be all
    experiment: Experiment = fdl.build(resolve_items(items, "Experiment").config)
    world.run_on_first(lambda: experiment.check(world.size))
    experiment.share_manifests(world)
    assert experiment.inputs()["shards.path"]["sha256"] == experiment.shards.parts[0].manifest.identity()
    steps = training_steps(
        experiment.shards, experiment.collate, rows_per_step=ROWS, micro_batch=1, rank=world.rank, ranks=world.size
    )
    assert len(next(steps)) == ROWS // world.size
    steps.close()


@pytest.mark.parametrize("ranks", [1, 4])
def test_only_the_first_rank_reads_manifests_and_all_indexes(tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    write_caches(tiny.export(block_positions=32, shard_bytes=32 * 16), tmp_path)
    files = [path.name for split in ("train", "validation") for path in sorted((tmp_path / split).iterdir())]
    shards = sum(name.startswith("shard") and name.endswith(".tar") for name in files)
    with serving(tmp_path) as (url, behaviour):
        items = [item.replace(f"{tiny.root}/cache", url) for item in tiny.train_items(2)]
        items += ["shards.prefetch=0", "shards.block_cache=none", "evaluation.shards.block_cache=none"]
        run_ranks(ranks, partial(_start, items=items))
    asked = Counter(name.rpartition(".")[2] for name in behaviour.asked if name.startswith("shard"))
    assert behaviour.asked.count("manifest.json") == 2, "one of each cache"
    # A block of each cache for its check, and those of the rows: a record each, at most three to a row here.
    assert ROWS <= asked["tar"] <= 2 + 3 * ROWS < shards
    # All by the first rank, and by each other rank those of the shards that its rows lie in.
    assert shards <= asked["index"] <= shards + (asked["tar"] if ranks > 1 else 0)
    assert behaviour.asked.count("tables.tar") == 1 + ranks, "one of each cache for its check, and of each other rank"


def _share(world: World, items: list[str], folder: str) -> None:
    os.chdir(Path(folder) / str(world.rank))
    experiment: Experiment = fdl.build(resolve_items(items, "Experiment").config)
    with pytest.raises(UsageError, match="rank 1 differs from rank 0 in the contents of cache/train: ") as caught:
        experiment.share_manifests(world)
    assert "Start every rank with" in str(caught.value)


def test_a_host_whose_folder_holds_another_export_is_named(tiny: Tiny, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        shutil.copytree(tiny.root / "cache", tmp_path / rank / "cache")
    manifest = tmp_path / "1" / "cache" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", "{ ", 1))
    items = [item.replace(f"{tiny.root}/cache", "cache") for item in tiny.train_items(2)]
    run_ranks(2, partial(_share, items=items, folder=str(tmp_path)))
