"""Settings of how a run is spread over ranks and memory, with their checks. `parallelize.py` applies them."""

import contextlib
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.utils.deterministic

from kd_core.errors import UsageError
from kd_core.parallel.layout import Layout, make_layout
from kd_core.precision import Precision, dtype_of
from kd_core.ranges import AT_LEAST_1, SECONDS, check_settings

# Settings that may change when a run is resumed, because it trains the same student with any of them.
LAYOUT_SETTINGS = (
    "micro_batch_rows", "tensor_parallel", "sequence_parallel", "context_parallel", "shard", "replicas", "recompute",
    "compile", "cuda_graphs", "deterministic", "timeout",
)  # fmt: skip


@dataclass(frozen=True)
class Parallel:
    """Settings of parallelism and memory. All of them train the same student, and `README.md` compares them.

    Args:
        precision: what matmuls multiply in. auto: bfloat16 where the device has instructions for it, else float32.
            A run records its choice. Weights, optimiser and reductions stay float32.
        micro_batch_rows: rows of one forward and backward pass on a rank. Gradients of a step's passes add up.
        tensor_parallel: ranks that share each layer's attention heads, feed-forward and vocabulary. They should be
            on one machine.
        sequence_parallel: divide norms and residuals of those ranks by position, instead of repeating them.
        context_parallel: ranks that divide each row by position, for rows whose activations one rank cannot hold. They
            gather keys and values of the whole row.
        shard: what data-parallel ranks share. none: nothing, each has a whole copy. gradients: weights, gradients and
            moments, where weights are gathered once a step, and gradients are reduced in its last pass. full: the
            same, where each pass gathers the weights of each block, again in the backward pass, and reduces gradients.
        replicas: copies that are each sharded over size / (replicas · tensor_parallel) ranks, in hybrid sharding.
        recompute: activations that are computed again in the backward pass: none, full, every:N blocks, or all but
            those that are dear for their size, within a share of what none keeps (budget:0.5).
        compile: compile each block. A loop over documents stays outside.
        cuda_graphs: launch each compiled block as CUDA graphs, for a student so small that launching kernels takes
            longer than running them. For one GPU and one pass a step, without recomputation.
        deterministic: take kernels that add in a fixed order, where torch has them. A GPU should then repeat a run
            bit by bit, at some cost. This has not been run on one. A CPU does so anyway.
        timeout: seconds without progress on a rank after which the run ends, with that rank's number.
    """

    precision: Precision = "auto"
    micro_batch_rows: int = 4
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    context_parallel: int = 1
    shard: Literal["none", "gradients", "full"] = "gradients"
    replicas: int = 1
    recompute: str = "none"
    compile: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        counts = {"micro_batch_rows": AT_LEAST_1, "tensor_parallel": AT_LEAST_1, "context_parallel": AT_LEAST_1}
        check_settings(self, "parallel.", **counts, replicas=AT_LEAST_1, timeout=SECONDS)
        if self.replicas > 1 and self.shard == "none":
            raise UsageError("parallel.replicas: without sharding every rank has a copy. Leave it at 1, or shard.")
        if self.recomputed_every() is not None and self.cuda_graphs:
            raise UsageError(
                f"parallel.cuda_graphs: got recompute={self.recompute}; wanted none. Leave one of them out."
            )
        if self.cuda_graphs and not self.compile:
            raise UsageError("parallel.cuda_graphs: graphs are made of compiled blocks. Set parallel.compile=true too.")

    def layout(self, size: int) -> Layout:
        """Returns the layout of `size` ranks, or raises the errors of `make_layout`."""
        replicas = None if self.shard == "none" else self.replicas
        return make_layout(size, self.tensor_parallel, replicas, self.context_parallel)

    def recomputed_every(self) -> int | None:
        """Returns n where every n-th block computes its activations again, or None where no block does.

        Raises:
            UsageError: `recompute` is none of its choices.
        """
        kind, _, number = self.recompute.partition(":")
        if self.recompute in ("none", "full"):
            return {"none": None, "full": 1}[self.recompute]
        if self.recompute_budget() is not None:
            return 1
        if kind != "every" or not number.isdecimal() or int(number) < 1:
            raise UsageError(
                f"parallel.recompute: got {self.recompute!r}; wanted none, full, every:N with N ≥ 1, or budget:S with "
                "0 < S < 1."
            )
        return int(number)

    def recompute_budget(self) -> float | None:
        """Returns the share of activations that is kept at most, or None where `recompute` is no budget."""
        kind, _, share = self.recompute.partition(":")
        is_share = kind == "budget" and re.fullmatch(r"0?\.\d+", share) is not None and float(share) > 0
        return float(share) if is_share else None

    def choose_kernels(self) -> None:
        """Sets which kernels torch takes in this process. torch warns of operations that have no deterministic one."""
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first matmul
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        # What is not written is not read here.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]

    @contextlib.contextmanager
    def backward_kernels(self) -> Generator[None]:
        """Makes torch raise, instead of warn, of operations in its block without a deterministic kernel, if wanted.

        Backward passes of attention add in a fixed order only then. Under `warn_only` they warn and do not.
        """
        if not self.deterministic:
            yield
            return
        enabled = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context in which forward passes run."""
        matmul_dtype = dtype_of(self.precision, device)
        return torch.autocast(device.type, torch.bfloat16, enabled=matmul_dtype == torch.bfloat16)
