import pytest

from kd_core.errors import RemoteError, UsageError
from kd_core.parallel.collectives import assert_ranks_agree, describe_difference, run_on_all_ranks
from kd_core.parallel.world import World
from tests.ranks import run_ranks


def test_a_difference_is_named_by_fact_and_rank_with_both_values() -> None:
    assert describe_difference([{"a": "1", "b": "2"}] * 3) is None
    said = describe_difference([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}])
    assert said == "rank 2 differs from rank 0 in b: 2 on rank 0, 3 on rank 2"
    assert describe_difference([{"a": "1"}, {"c": "1"}]) == (
        "rank 1 differs from rank 0 in a (and in 1 more): 1 on rank 0, nothing on rank 1"
    )
    assert len(describe_difference([{"a": "x" * 1000}, {"a": "y" * 1000}]) or "") < 250


def _ranks(world: World) -> None:
    def work() -> int:
        if world.rank == 1:
            raise UsageError("no disk")
        return world.rank

    own = UsageError if world.is_first else RemoteError
    assert run_on_all_ranks(world, lambda: world.rank) == [0, 1]
    with pytest.raises(own, match=r"^rank 1: no disk$"):
        run_on_all_ranks(world, work)
    assert_ranks_agree(world, {"code": "abc"})
    with pytest.raises(own, match=r"rank 1 differs from rank 0 in lr: 0 on rank 0, 1 on rank 1\. Start every"):
        assert_ranks_agree(world, {"code": "abc", "lr": str(world.rank)})


def test_all_ranks_stop_and_the_first_alone_says_why() -> None:
    run_ranks(2, _ranks)
