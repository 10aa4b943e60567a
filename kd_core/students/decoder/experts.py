"""Mixture of experts (arXiv 1701.06538): a router sends each position to k of E feed-forwards.

    x [N, D] ─ router ─► logits [N, E] ─ top k ─► experts and weights [N, k]
    rows of x, sorted by expert [N·k, D] ─ grouped matmuls ─► outputs [N·k, D] ─ weighted, added up ─► [N, D]

No position is dropped, whatever the load of its experts.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kd_core.compiling import outside_compiled_graphs
from kd_core.row_shares import WHOLE_ROWS, PackedDocuments, RowShare
from kd_core.sharded_values import local_values, sum_over_shares
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.transformer_block import TransformerBlock, scale
from kd_core.students.student import ShardingRule

BALANCE, Z = "router_balance", "router_z"
GROUPED_DTYPES, GRAPH_DEVICES = (torch.float32, torch.bfloat16, torch.float16), ("cuda",)


class Groups(NamedTuple):
    """Rows sorted by expert: the expert of each, and where the rows of each of a rank's E experts end.

    Rows behind the last end are those of other ranks, with expert E.
    """

    experts: Int[Tensor, " S"]
    ends: Int[Tensor, " E"]


@outside_compiled_graphs
def _multiply_in_turn(
    x: Float[Tensor, "S D"], weight: Float[Tensor, "E D F"], ends: Int[Tensor, " E"]
) -> Float[Tensor, "S F"]:
    """Multiplies the rows of one expert after the other. Waits for the device."""
    bounds = [0, *ends.tolist(), len(x)]
    groups = x.split([end - start for start, end in pairwise(bounds)])
    products = [group @ matrix for group, matrix in zip(groups, weight.unbind(), strict=False)]
    return torch.cat([*products, x.new_zeros(len(groups[-1]), weight.shape[2])])


# Inductor has such a kernel for bfloat16 on a GPU alone. Elsewhere the kernel is outside of compiled graphs.
_multiply_outside_graphs = outside_compiled_graphs(F.grouped_mm)


def multiply_groups(
    x: Float[Tensor, "S D"], weight: Float[Tensor, "E D F"], ends: Int[Tensor, " E"]
) -> Float[Tensor, "S F"]:
    """Multiplies each row by the matrix of its expert, in autocast's dtype. Rows behind the last end are undefined."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    # The kernel reads rows of both, of whole 16 bytes each.
    is_aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype not in GROUPED_DTYPES or not is_aligned:
        return _multiply_in_turn(x, weight, ends)
    if device in GRAPH_DEVICES and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=ends)
    return _multiply_outside_graphs(x, weight, offs=ends)


class Experts(nn.Module):
    """E SwiGLU feed-forwards of F channels as stacked matrices: gate above up [E, 2F, D], and down [E, D, F].

    `first_expert` is the number of a rank's first expert, where tensor parallelism divides them.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        assert arch.experts is not None
        self.count, self.first_expert = arch.experts.count, 0
        size = arch.experts.size or arch.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.count, 2 * size, arch.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.count, arch.hidden_size, size))

    def feed_forward(self, x: Float[Tensor, "S D"], groups: Groups) -> Float[Tensor, "S D"]:
        """Computes down(silu(gate(x)) ⊙ up(x)) of each row's expert."""
        # [S, 2F] → gate and up, [S, F] each
        gate, up = multiply_groups(x, local_values(self.gate_up_proj).mT, groups.ends).chunk(2, dim=-1)
        return multiply_groups(F.silu(gate) * up, local_values(self.down_proj).mT, groups.ends)

    def forward(
        self, x: Float[Tensor, "B T D"], experts: Int[Tensor, "B T k"], weights: Float[Tensor, "B T k"]
    ) -> Float[Tensor, "B T D"]:
        """Returns Σ weight · expert(x) over the chosen experts of each position that this rank has."""
        B, k, held = len(x), experts.shape[-1], len(local_values(self.down_proj))
        # Number the experts of this rank from 0, and those of others `held`, which sorts them to the end.  [N·k]
        numbers = experts.flatten() - self.first_expert
        numbers = torch.where((numbers >= 0) & (numbers < held), numbers, held)
        order = numbers.argsort(stable=True)
        ends = torch.searchsorted(numbers[order], torch.arange(held, device=x.device), right=True)
        groups = Groups(numbers[order], ends.int())
        # Row r of the sorted ones is that of position order[r] / k.  [N·k, D]
        rows = rearrange(x, "B T D -> (B T) D").index_select(0, order // k)
        if held < self.count:
            # Rows of other ranks are undefined behind a kernel, in both directions: exclude them on both sides.
            is_held = (groups.experts < held)[:, None]
            outputs = torch.where(is_held, self.feed_forward(torch.where(is_held, rows, 0), groups), 0)
        else:
            outputs = self.feed_forward(rows, groups)
        # Back in the order of positions, times their weights, added up.  [N·k, D] → [N, k, D] → [B, T, D]
        by_position = rearrange(outputs.index_select(0, order.argsort()), "(B T k) D -> B T k D", B=B, k=k)
        return (by_position * weights[..., None].to(outputs.dtype)).sum(dim=2)


class Router(nn.Module):
    """The linear map from hidden states to a logit of each expert, in float32 (arXiv 2101.03961)."""

    def __init__(self, arch: Architecture, bias: bool) -> None:
        super().__init__()
        assert arch.experts is not None
        self.weight = nn.Parameter(torch.empty(arch.experts.count, arch.hidden_size))
        self.bias = nn.Parameter(torch.empty(arch.experts.count)) if bias else None

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T E"]:
        """Maps [B, T, D] to [B, T, E]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class MixtureOfExperts(nn.Module):
    """A router and its experts."""

    def __init__(self, arch: Architecture, experts: type[Experts], router_bias: bool) -> None:
        super().__init__()
        assert arch.experts is not None
        self.router, self.experts, self.settings = Router(arch, router_bias), experts(arch), arch.experts

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T E"]]:
        """Returns the weighted outputs of each position's experts, and the router's logits."""
        logits = self.router(x)
        # Softmax over the chosen experts, or over all of them, of which the chosen ones keep their share.  [B, T, k]
        if self.settings.normalised:
            chosen, experts = logits.topk(self.settings.per_token, dim=-1)
            weights = chosen.softmax(dim=-1)
        else:
            weights, experts = logits.softmax(dim=-1).topk(self.settings.per_token, dim=-1)
        return self.experts(x, experts, weights), logits


class ExpertBlock(TransformerBlock):
    """A transformer block whose feed-forward is a mixture of experts, but for the layers that have a dense one."""

    sharding_rules: Mapping[str, ShardingRule] = {
        **TransformerBlock.sharding_rules,
        "mlp.router": "repeated",
        "mlp.experts": "experts",
    }
    experts: type[Experts] = Experts
    router_bias = False

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__(arch, layer)
        self.is_dense = layer in arch.dense_layers
        if not self.is_dense:
            self.mlp = MixtureOfExperts(arch, self.experts, self.router_bias)

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes `forward`, and returns the router's logits beside it."""
        if self.is_dense:
            return super().run(x, cos, sin, documents)
        # x ← x + attention(norm(x)), then x ← x + experts(norm(x)).  [B, T, D]
        x = x + scale(self.self_attn(self.input_layernorm(x), cos, sin, documents), self.residual_scale)
        y, logits = self.mlp(self.post_attention_layernorm(x))
        return x + scale(y, self.residual_scale), logits


def router_values(
    logits: Sequence[Float[Tensor, "B T E"]],
    per_token: int,
    is_text: Bool[Tensor, "B T"],
    row_share: RowShare = WHOLE_ROWS,
) -> dict[str, Float[Tensor, "B T"]]:
    """Returns what keeps routers balanced and their logits small, at each position.

        router_balance    E · Σ share · probability, of shares of assignments and mean probabilities of the experts
                          over a row's text and all layers (arXiv 2101.03961), the same at each position of the row
        router_z          log² Σ exp(logits), the mean over layers (arXiv 2202.08906)

    Args:
        logits: those of each router.
        per_token: experts of a position.
        is_text: positions that are not padding.
        row_share: which positions of their rows these are. Sums go over whole rows, also where ranks share them.
    """
    E, mask = logits[0].shape[-1], is_text[..., None]
    positions = len(logits) * sum_over_shares(is_text.sum(dim=1, keepdim=True), row_share).clamp(min=1)
    shares = probabilities = z = logits[0].new_zeros(())
    for layer in logits:
        # Assignments of each expert, and the sum of its probabilities, over a row's text.  [B, E]
        chosen = torch.zeros_like(layer).scatter(-1, layer.topk(per_token, dim=-1).indices, 1.0)
        shares = shares + torch.where(mask, chosen, 0.0).sum(dim=1)
        probabilities = probabilities + torch.where(mask, layer.softmax(dim=-1), 0.0).sum(dim=1)
        z = z + layer.logsumexp(dim=-1).square() / len(logits)
    shares, probabilities = sum_over_shares(shares, row_share), sum_over_shares(probabilities, row_share)
    # [B, E] → [B] → [B, T]
    balance = E * ((shares / positions) * (probabilities / positions)).sum(dim=-1)
    return {BALANCE: balance[:, None].expand_as(is_text), Z: z}
