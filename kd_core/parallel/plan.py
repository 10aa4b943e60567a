"""How a run is laid out: precision, rows a micro-batch, and the place of tensor parallelism."""

from dataclasses import dataclass

import torch

from kd_core.errors import UsageError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Parallel:
    """`precision` is what matmuls multiply in; weights, optimiser and reductions stay float32. A rank that makes no
    progress for `timeout` seconds ends the run, by name."""

    precision: str = "bfloat16"
    micro_batch_rows: int = 4
    tensor_parallel: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"parallel.precision: got {self.precision!r}; wanted one of {', '.join(PRECISIONS)}.")
        if self.micro_batch_rows < 1:
            raise UsageError(f"parallel.micro_batch_rows: got {self.micro_batch_rows}; wanted at least 1.")
        if not self.timeout > 0:
            raise UsageError(f"parallel.timeout: got {self.timeout}; wanted seconds, more than 0.")
        if self.tensor_parallel != 1:
            raise UsageError(
                f"parallel.tensor_parallel: got {self.tensor_parallel}; only 1 is there yet (data parallelism alone). "
                "Leave it at 1 and start more ranks with torchrun --nproc-per-node."
            )

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
