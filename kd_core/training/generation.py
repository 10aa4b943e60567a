"""Greedy continuations of a few short prompts, to look at samples of a model.

Nothing is cached between tokens: every token costs a whole forward pass over all rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_core.losses.fused.vocab_shard import VocabShard
from kd_core.parallel import engine
from kd_core.parallel.config import Parallel
from kd_core.parallel.vocab_parallel import local_lm_head
from kd_core.parallel.world import World
from kd_core.students.student import Student


@dataclass(frozen=True)
class Prompts:
    """Prompts as texts and as token ids, how many tokens to generate for each, and the function that decodes ids."""

    texts: tuple[str, ...]
    ids: list[list[int]]
    tokens: int
    decode: Callable[[Sequence[int]], str]


def _likeliest(logits: Tensor, part: VocabShard) -> Tensor:
    """Returns the argmax token over the whole vocabulary, [B], from a vocab shard's logits, [B, rows of the shard].

    The lowest id wins among equal logits.
    """
    # The best of this shard.  [B], [B]
    best, ids = logits.max(dim=1)
    if part.group is None:
        return ids
    # The best of all shards.  [B]
    highest = best.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=part.group)
    # Ranks that hold it offer their global id, all others a larger number. The lowest offer is the token.
    ids = torch.where(best == highest, ids + part.first, torch.iinfo(ids.dtype).max)
    dist.all_reduce(ids, dist.ReduceOp.MIN, group=part.group)
    return ids


def continue_greedily(
    model: Student, prompts: Sequence[list[int]], tokens: int, parallel: Parallel, world: World
) -> list[list[int]]:
    """Returns the next `tokens` tokens of each prompt, by greedy decoding.

    All ranks call it with the same prompts, and all get the same result.
    """
    # How many tokens of each row are known so far.  [B]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=world.device)
    rows = torch.arange(len(prompts), device=world.device)
    longest = max(map(len, prompts), default=0) + tokens

    def next_ids(hidden: Tensor, weight: Tensor) -> Tensor:
        shard = local_lm_head(hidden, weight)
        # Hidden state of each row's last known token, [B, D], and how many rows of the shard are real tokens.
        last, real_rows = (
            shard.hidden[rows, lengths - 1],
            shard.vocab_shard.rows(len(shard.weight), model.arch.vocab_size),
        )
        with torch.autocast(world.device.type, enabled=False):  # in float32: rounded logits would have ties
            logits = last.float() @ shard.weight.float().t()  # [B, rows of the shard]
        # Rows that only pad the vocabulary are never chosen.
        is_padding = torch.arange(logits.shape[1], device=world.device) >= real_rows
        return _likeliest(logits.masked_fill(is_padding, -torch.inf), shard.vocab_shard)

    # Room for all tokens to come.  [B, longest]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(world.device)
    ids = torch.nn.functional.pad(ids, (0, longest - ids.shape[1]))
    with engine.evaluation(model, parallel, world):
        for _ in range(tokens):
            # Attention is causal, so padding right of a row's last token changes nothing before it. The length is
            # rounded up to a multiple of the tensor-parallel ranks, among which sequence parallelism divides it.
            T = -(-int(lengths.max()) // world.layout.tensor) * world.layout.tensor
            padded = torch.nn.functional.pad(ids[:, :T], (0, max(0, T - ids.shape[1])))  # [B, T]
            positions = torch.arange(T, device=world.device).expand_as(padded)
            ids[rows, lengths] = model(padded, positions, torch.zeros_like(padded), next_ids)
            lengths += 1
    return [row[len(prompt) : len(prompt) + tokens].tolist() for prompt, row in zip(prompts, ids, strict=True)]


def continuations(model: Student, prompts: Prompts, parallel: Parallel, world: World) -> dict[str, str]:
    """Returns the model's continuation of each prompt as text."""
    generated = continue_greedily(model, prompts.ids, prompts.tokens, parallel, world)
    return {text: prompts.decode(ids) for text, ids in zip(prompts.texts, generated, strict=True)}
