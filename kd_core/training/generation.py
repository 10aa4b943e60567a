"""Greedy continuations of a few short prompts, to look at samples of a model.

prompts [B, T] ─ one pass ─► a token of each row ─ one pass over it, with keys and values cached ─► the next …
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_core.logit_products import multiply_
from kd_core.losses.fused.lm_head import LmHead, MatmulPrecision
from kd_core.losses.fused.vocab_shard import VocabShard
from kd_core.parallel import engine
from kd_core.parallel.config import Parallel
from kd_core.parallel.vocab_parallel import local_lm_head
from kd_core.parallel.world import World
from kd_core.students.student import Student
from kd_core.types import LmHeadForm


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


def _next_ids(form: LmHeadForm, last: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns the likeliest token [B] behind position `last` [B] of each row, of a pass's hidden states [B, T, D]."""
    local = local_lm_head(hidden, weight)
    rows = torch.arange(len(last), device=last.device)
    # Logits are float32: rounded ones would have ties. Rows that pad the vocabulary are cut.  [B, V of the shard]
    head = LmHead.from_weight(local.weight, form, local.vocab_shard, MatmulPrecision(weight.dtype, torch.float32))
    logits = torch.empty(len(last), len(head.weight), device=last.device)
    with torch.autocast(last.device.type, enabled=False):
        multiply_(local.hidden[rows, last], head.weight, logits, head.precision.matmul_dtype)
        head.to_logits_(logits, head.bias)
    return _likeliest(logits.fill_(-torch.inf) if head.shard.padding else logits, local.vocab_shard)


def append_tokens(model: Student, ids: Tensor, lengths: Tensor, longest: int, tokens: int, multiple: int = 1) -> Tensor:
    """Appends so many tokens to each row, and returns all ids. Nothing waits for a device.

    Args:
        model: the student.
        ids: rows of prompts with room for the tokens, and for the padding of a pass.  [B, slots]
        lengths: how many tokens of each row are known.  [B]
        longest: the largest of them.
        tokens: how many are appended.
        multiple: the length of a pass is a multiple of it.
    """
    cache, form = model.new_cache(ids.shape[1]), model.lm_head_form
    for step in range(tokens):
        # A pass takes the prompts, and then the last token of each row. Without a cache, it takes all tokens so far.
        is_whole = step == 0 or cache is None
        begin = torch.zeros_like(lengths) if is_whole else lengths - 1
        # Attention is causal, so padding right of a row's last token changes nothing before it.  [B, T]
        T = -(-(longest + step if is_whole else 1) // multiple) * multiple
        positions = begin[:, None] + torch.arange(T, device=ids.device)
        inputs = ids.gather(1, positions)
        head = functools.partial(_next_ids, form, lengths - 1 - begin)
        next_ids = model(inputs, positions, torch.zeros_like(inputs), head, cache=cache)
        ids = ids.scatter(1, lengths[:, None], next_ids[:, None])
        lengths = lengths + 1
    return ids


def continue_greedily(
    model: Student, prompts: Sequence[list[int]], tokens: int, parallel: Parallel, world: World
) -> list[list[int]]:
    """Returns the next `tokens` tokens of each prompt, by greedy decoding.

    All ranks call it with the same prompts, and all get the same result.

    Raises:
        UsageError: a prompt with its continuation is longer than documents that the model may have.
    """
    # Sequence parallelism divides the length of a pass among the tensor-parallel ranks.
    longest, multiple = max(map(len, prompts), default=0), world.layout.tensor
    model.arch.check_length(longest + tokens - 1, "prompts")  # the last token is none that a pass takes
    # Room for all tokens to come, and for the padding of a pass.  [B, slots]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(world.device)
    ids = torch.nn.functional.pad(ids, (0, tokens + multiple))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=world.device)
    eager = torch.compiler.set_stance("force_eager") if parallel.compile else contextlib.nullcontext()
    with engine.evaluation(model, parallel, world), eager:
        rows = append_tokens(model, ids, lengths, longest, tokens, multiple).tolist()
    return [row[len(prompt) : len(prompt) + tokens] for prompt, row in zip(prompts, rows, strict=True)]


def continuations(model: Student, prompts: Prompts, parallel: Parallel, world: World) -> dict[str, str]:
    """Returns the model's continuation of each prompt as text."""
    generated = continue_greedily(model, prompts.ids, prompts.tokens, parallel, world)
    return {text: prompts.decode(ids) for text, ids in zip(prompts.texts, generated, strict=True)}
