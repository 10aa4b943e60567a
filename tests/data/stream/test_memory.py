"""Memory while a cache of 100 shards is read: flat, and bounded."""

from pathlib import Path

import pytest

from benchmarks.reading_memory import read_epoch
from tests.synthetic import write_cache


@pytest.mark.slow
def test_memory_is_flat_over_100_shards(tmp_path: Path) -> None:
    found = read_epoch(write_cache(tmp_path / "cache", 100, 2, row_length=1024), prefetch=2)
    quarters = [found[f"mb_above_start_in_quarter_{i}"] for i in range(1, 5)]
    assert max(quarters) <= 600  # 64 lanes, each with a decoded block of 4 MB, and steps that wait
    assert quarters[3] <= quarters[0] + 50
