"""Layout of a teacher over ranks: its settings, and what a scorer's rank shares with others.

A teacher is laid out as a student is (`kd_core/parallel/layout.py`): rank r of replicas × shards × tp. The ranks of a
tensor-parallel group score the same windows. Groups score different shards of a cache.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch.distributed as dist

from data.teacher.vocab_slices import WHOLE_VOCAB, WholeVocab
from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.layout import Layout
from kd_core.parallel.world import World
from kd_core.precision import Precision
from kd_core.ranges import AT_LEAST_1, check_settings

V = TypeVar("V")


@dataclass(frozen=True)
class TeacherParallel:
    """Settings of how a teacher is laid out over ranks. A cache may be finished with others than it was begun with.

    Args:
        tensor_parallel: ranks that share each layer's attention heads, feed-forward and vocabulary, and score the same
            windows. They should be on one machine.
        expert_parallel: give each of those ranks some experts of a mixture whole, instead of a slice of every expert.
            For teachers through transformers.
        shard: what groups that score different windows share. none: nothing, each has a whole copy. full: weights,
            which each pass gathers block by block, for what is only too large for memory.
        replicas: copies that are each sharded over size / (replicas · tensor_parallel) groups, for shard=full.
    """

    tensor_parallel: int = 1
    expert_parallel: bool = False
    shard: Literal["none", "full"] = "none"
    replicas: int = 1

    def __post_init__(self) -> None:
        check_settings(self, "parallel.", tensor_parallel=AT_LEAST_1, replicas=AT_LEAST_1)
        if self.replicas > 1 and self.shard == "none":
            raise UsageError("parallel.replicas: without sharding every group has a copy. Leave it at 1, or shard.")
        if self.expert_parallel and self.tensor_parallel == 1:
            raise UsageError(
                "parallel.expert_parallel: got one rank to hold experts. Set parallel.tensor_parallel too."
            )

    @property
    def is_set(self) -> bool:
        """Returns False where every rank has a whole teacher."""
        return self.tensor_parallel > 1 or self.shard == "full"

    def engine(self, dtype: Precision = "auto") -> Parallel:
        """Returns the settings by which `parallelize.py` lays a decoder out."""
        return Parallel(dtype, tensor_parallel=self.tensor_parallel, shard=self.shard, replicas=self.replicas)

    def lay_out(self, world: World) -> World:
        """Returns the world with the teacher's mesh, or as it is where every rank has a whole teacher."""
        return world.with_layout(self.engine().layout(world.size)) if self.is_set else world


class ScorerRanks(NamedTuple):
    """Ranks that share a scorer. Without a layout, a rank scores alone.

    `vocab` is this rank's slice of the vocabulary.
    """

    vocab: WholeVocab = WHOLE_VOCAB
    layout: Layout = Layout()
    rank: int = 0

    @classmethod
    def of_world(cls, world: World, vocab: WholeVocab) -> "ScorerRanks":
        """Returns the ranks of a world that is laid out."""
        return cls(vocab, world.layout, world.rank) if world.mesh is not None else cls()

    @property
    def is_first_of_group(self) -> bool:
        """Returns True on the one rank of a tensor-parallel group that encodes and writes."""
        return self.rank % self.layout.tensor == 0

    @property
    def is_shared(self) -> bool:
        """Returns True where a pass is a collective, so that all ranks make the same passes in the same order."""
        return self.layout.size > 1

    @property
    def passes_together(self) -> bool:
        """Returns True where also ranks that score different windows make the same number of passes."""
        return self.layout.shards > 1

    def gather(self, value: V) -> list[V]:
        """Returns the values of all ranks of the layout."""
        if not self.is_shared:
            return [value]
        values: list[V] = [value] * self.layout.size
        dist.all_gather_object(values, value)
        return values


WHOLE_COPIES = TeacherParallel()
ALONE = ScorerRanks()
