"""How a run is spread over ranks and memory: a declaration, checked by itself; `sharding.py` carries it out."""

from dataclasses import dataclass

import torch

from kd_core.errors import UsageError
from kd_core.parallel.layout import Layout, lay_out
from kd_core.precision import Precision, dtype_of
from kd_core.ranges import AT_LEAST_1, SECONDS, check_ranges

# What a run may have otherwise when it is resumed: it trains the same student.
LAYOUT_SETTINGS = (
    "micro_batch_rows", "tensor_parallel", "sequence_parallel", "shard", "replicas", "recompute", "compile", "timeout"
)  # fmt: skip
SHARDINGS = ("none", "gradients", "full")


@dataclass(frozen=True)
class Parallel:
    """Which ranks share what. Whatever is chosen, a run trains the same student; `README.md` says which to take.

    Args:
        precision: what matmuls multiply in. auto: bfloat16 where the device has instructions for it, else float32;
            a run records which. Weights, optimiser and reductions stay float32.
        micro_batch_rows: rows of one forward and backward pass on a rank; gradients of a step's passes add up.
        tensor_parallel: ranks that share each layer's heads, feed-forward and vocabulary; best on one machine.
        sequence_parallel: norms and residuals of those ranks are shared by position, instead of repeated.
        shard: what data-parallel ranks share. none: nothing, each has a whole copy. gradients: weights, gradients and
            moments, and weights are gathered once a pass. full: gathered for each block, again in the backward pass.
        replicas: copies that are each sharded over size / (replicas · tensor_parallel) ranks, in hybrid sharding.
        recompute: activations that are computed again in the backward pass: none, full, or every:N blocks.
        compile: compile each block, around its attention.
        timeout: seconds without progress on a rank after which the run ends, naming it.
    """

    precision: Precision = "auto"
    micro_batch_rows: int = 4
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    shard: str = "gradients"
    replicas: int = 1
    recompute: str = "none"
    compile: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.shard not in SHARDINGS:
            raise UsageError(f"parallel.shard: got {self.shard!r}; wanted one of {', '.join(SHARDINGS)}.")
        counts = {"micro_batch_rows": AT_LEAST_1, "tensor_parallel": AT_LEAST_1, "replicas": AT_LEAST_1}
        check_ranges(self, "parallel.", **counts, timeout=SECONDS)
        if self.replicas > 1 and self.shard == "none":
            raise UsageError("parallel.replicas: without sharding every rank has a copy. Leave it at 1, or shard.")
        self.recomputed_every()

    def layout(self, size: int) -> Layout:
        """Of so many ranks; errors as in `lay_out`."""
        return lay_out(size, self.tensor_parallel, None if self.shard == "none" else self.replicas)

    def recomputed_every(self) -> int | None:
        """Every how many blocks activations are computed again; None is never."""
        kind, _, every = self.recompute.partition(":")
        if self.recompute in ("none", "full"):
            return {"none": None, "full": 1}[self.recompute]
        if kind != "every" or not every.isdecimal() or int(every) < 1:
            raise UsageError(f"parallel.recompute: got {self.recompute!r}; wanted none, full, or every:N with N ≥ 1.")
        return int(every)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forward passes run in."""
        multiplied = dtype_of(self.precision, device)
        return torch.autocast(device.type, torch.bfloat16, enabled=multiplied == torch.bfloat16)
