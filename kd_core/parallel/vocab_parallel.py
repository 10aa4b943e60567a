"""Local view of the lm_head on one rank: hidden states of whole rows, and the rank's vocab shard of the weight."""

import math
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from kd_core.losses.fused.vocab_shard import WHOLE_VOCAB, VocabShard


class LocalLmHead(NamedTuple):
    """Plain tensors: hidden states [B, T, D], and the rows of the weight that `vocab_shard` describes, [V_local, D]."""

    hidden: Tensor
    weight: Tensor
    vocab_shard: VocabShard


def local_lm_head(hidden: Tensor, weight: Tensor) -> LocalLmHead:
    """Returns the local lm_head of hidden states [B, T, D] and a weight [V, D], whose rows may be divided over ranks.

    Each rank computes the gradient with respect to hidden states from its own vocab shard. These partial gradients
    are summed over ranks in the backward pass.
    """
    if not isinstance(weight, DTensor):
        return LocalLmHead(hidden, weight, WHOLE_VOCAB)
    assert isinstance(hidden, DTensor)
    mesh = weight.device_mesh
    whole = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    first = mesh.get_local_rank() * math.ceil(weight.shape[0] / mesh.size())
    return LocalLmHead(whole, weight.to_local(), VocabShard(first, mesh.get_group()))
