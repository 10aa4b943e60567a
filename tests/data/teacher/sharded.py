"""A teacher on the ranks of a test: its layouts, and its scores in one process. Imports no transformers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.cache.selection import Selection
from data.teacher import scorer as scorer_module
from data.teacher import transformers_scorer
from data.teacher.scorer import DecoderScorer, Scorer, TeacherScores, score_rows
from data.teacher.teacher_layout import TeacherParallel
from data.teacher.teacher_memory import rank_holding
from data.teacher.transformers_scorer import HuggingFaceScorer
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.sharded_values import local_values

CPU = torch.device("cpu")
REAL = 51  # tokens of the vocabulary; the models have 53 rows
SELECTION = Selection(8, min_prob=0.01, draws=6, tail_temperatures=(2.0,))
LAYOUT_ERROR = 2e-5  # nats of a log-probability between a layout and one process. Seen: 5e-6


@dataclass
class Task:
    """A teacher to lay out, and its scores in one process."""

    folder: Path
    is_decoder: bool
    layouts: list[TeacherParallel]
    tokens: Tensor
    documents: Tensor
    uniforms: Tensor
    one: TeacherScores

    def load(self, parallel: TeacherParallel, world: World) -> Scorer:
        if self.is_decoder:
            return DecoderScorer.load(self.folder, torch.float32, REAL, parallel, world)
        return HuggingFaceScorer.load(self.folder, torch.float32, CPU, REAL, parallel, world)

    def score(self, scorer: Scorer) -> TeacherScores:
        return score_rows(scorer, self.tokens, self.documents, SELECTION, self.uniforms)


def few_positions(vocab_size: int, device: torch.device) -> int:
    """Chunks whose size depends on the vocabulary, as on a GPU; ranks must agree on them all the same."""
    del device
    return 400 // vocab_size


def compare(world: World, tasks: dict[str, Task]) -> None:
    scorer_module.chunk_positions = transformers_scorer.chunk_positions = few_positions
    worst = 0.0
    for name, task in tasks.items():
        for parallel in task.layouts:
            scorer = task.load(parallel, parallel.lay_out(world))
            scores = task.score(scorer)
            assert torch.equal(scores.ids, task.one.ids), f"{name}, {parallel}"
            assert torch.equal(scores.sampled_ids, task.one.sampled_ids), f"{name}, {parallel}"
            for field in ("log_probs", "tail_log_prob", "label_log_prob", "tempered_tails", "sampled_log_weights"):
                one, several = getattr(task.one, field), getattr(scores, field)
                torch.testing.assert_close(
                    several, one, atol=LAYOUT_ERROR, rtol=0, msg=lambda text, at=(name, parallel): f"{at}: {text}"
                )
                worst = max(worst, float((one - several).nan_to_num(0.0).abs().max()))
                # FSDP gathers the same weights, so its scores have the same bits.
                assert parallel.tensor_parallel > 1 or torch.equal(one, several), f"{name}, {parallel}"
            # The dry run knows what the fullest rank holds.
            scorer_name = "decoder" if task.is_decoder else "transformers"
            expected = rank_holding(task.folder, scorer_name, parallel, parallel.engine().layout(world.size))
            total = torch.tensor([sum(local_values(p).numel() for p in scorer.model.parameters())])
            dist.all_reduce(total, dist.ReduceOp.MAX)
            # What lies outside of blocks stays gathered after a pass, and transformers' lm_head is ours.
            slack = 0 if task.is_decoder and parallel.shard == "none" else expected.root_numbers
            assert abs(int(total) - expected.parameters) <= slack, f"{name}, {parallel}"
            # Between passes, a rank holds its part of the blocks alone.
            blocks = [p for n, p in scorer.model.named_parameters() if {"layers", "h"} & {*n.split(".")} and p.ndim > 1]
            assert blocks
            held, whole = (sum(p.numel() for p in part) for part in ([local_values(p) for p in blocks], blocks))
            assert held <= 0.8 * whole or (name == "tied" and parallel.tensor_parallel == 4), f"{name}, {parallel}"
    if world.rank == 0:
        print(f"{world.size} ranks: {worst:.1e} nats from one process")


def refuse(world: World, task: Task) -> None:
    """Lay out a family that has no plan for tensor parallelism, and ranks that are not divided."""
    with pytest.raises(UsageError, match=r"parallel\.tensor_parallel: transformers has no plan for GPT2LMHeadModel"):
        task.load(TeacherParallel(2), TeacherParallel(2).lay_out(world))
    with pytest.raises(UsageError, match=r"parallel\.tensor_parallel: got 3, but 2 ranks are not divided by it"):
        TeacherParallel(3).lay_out(world)


def refuse_heads(world: World, task: Task) -> None:
    """Lay out a family with fewer heads for keys and values than ranks, which its plan divides nevertheless."""
    with pytest.raises(UsageError, match=r"got 2, with which transformers cannot run .* 4 attention heads and 1 heads"):
        task.load(TeacherParallel(2), TeacherParallel(2).lay_out(world))
