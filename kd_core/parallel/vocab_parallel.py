"""The head as a rank holds it: hidden states of whole rows, and its rows of the weight."""

import math
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from kd_core.losses.fused.vocab_shard import WHOLE, Part


class LocalHead(NamedTuple):
    """Plain tensors, and which part of the vocabulary the weight's rows are."""

    hidden: Tensor
    weight: Tensor
    part: Part


def local_head(hidden: Tensor, weight: Tensor) -> LocalHead:
    """Of hidden states [B, T, D] and weight [V, D], divided by rows or not.

    Each rank's gradient by hidden states is that of its own rows: they are added up on the way back.
    """
    if not isinstance(weight, DTensor):
        return LocalHead(hidden, weight, WHOLE)
    assert isinstance(hidden, DTensor)
    mesh = weight.device_mesh
    whole = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    first = mesh.get_local_rank() * math.ceil(weight.shape[0] / mesh.size())
    return LocalHead(whole, weight.to_local(), Part(first, mesh.get_group()))
