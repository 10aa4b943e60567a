"""Greedy continuations, to look at what a model says. Short prompts: every token costs a whole forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_core.losses.fused.vocab_shard import Part
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import let_go
from kd_core.parallel.vocab_parallel import local_head
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder


@dataclass(frozen=True)
class Prompts:
    """Texts and their ids, how many tokens to continue each by, and what makes text of ids."""

    texts: tuple[str, ...]
    ids: list[list[int]]
    tokens: int
    decode: Callable[[Sequence[int]], str]


def _likeliest(logits: Tensor, part: Part) -> Tensor:
    """Of logits [B, rows of this part], the likeliest token [B]; of equals the first."""
    best, ids = logits.max(dim=1)
    if part.group is None:
        return ids
    highest = best.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=part.group)
    ids = torch.where(best == highest, ids + part.first, torch.iinfo(ids.dtype).max)
    dist.all_reduce(ids, dist.ReduceOp.MIN, group=part.group)
    return ids


@torch.no_grad()
def continue_greedily(
    model: Decoder, prompts: Sequence[list[int]], tokens: int, parallel: Parallel, world: World
) -> list[list[int]]:
    """The `tokens` likeliest next tokens of each prompt, one after the other. All ranks call it, with the same prompts;
    each gets the whole answer."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=world.device)
    rows = torch.arange(len(prompts), device=world.device)
    longest = max(map(len, prompts), default=0) + tokens

    def next_ids(hidden: Tensor, weight: Tensor) -> Tensor:
        here = local_head(hidden, weight)
        last, own = here.hidden[rows, lengths - 1], here.part.rows(len(here.weight), model.arch.vocab_size)
        with torch.autocast(world.device.type, enabled=False):  # rounded logits would have ties
            logits = last.float() @ here.weight.float().t()
        padding = torch.arange(logits.shape[1], device=world.device) >= own
        return _likeliest(logits.masked_fill(padding, -torch.inf), here.part)

    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(world.device)
    # What stands right of a row's last token is seen by none before it, so a row may be padded to any length: under
    # sequence parallelism to one that its ranks can divide.
    ids = torch.nn.functional.pad(ids, (0, longest - ids.shape[1]))
    with parallel.autocast(world.device):  # around all tokens: each parameter is rounded once
        for _ in range(tokens):
            T = -(-int(lengths.max()) // world.layout.tensor) * world.layout.tensor
            seen = torch.nn.functional.pad(ids[:, :T], (0, max(0, T - ids.shape[1])))
            positions = torch.arange(T, device=world.device).expand_as(seen)
            ids[rows, lengths] = model(seen, positions, torch.zeros_like(seen), next_ids)
            lengths += 1
    let_go(model)
    return [row[len(prompt) : len(prompt) + tokens].tolist() for prompt, row in zip(prompts, ids, strict=True)]


def continuations(model: Decoder, prompts: Prompts, parallel: Parallel, world: World) -> dict[str, str]:
    """What the model says after each prompt."""
    found = continue_greedily(model, prompts.ids, prompts.tokens, parallel, world)
    return {text: prompts.decode(ids) for text, ids in zip(prompts.texts, found, strict=True)}
