"""The one module that knows TensorBoard."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

QUEUE = 10_000  # numbers
FLUSH_SECONDS = 5


class Events:
    """A folder of TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        # A thread of its own writes; a step must not wait for it. What a kill takes from it is written anew on resume.
        self.writer = SummaryWriter(str(folder), max_queue=QUEUE, flush_secs=FLUSH_SECONDS)

    def add(self, line: dict[str, float]) -> None:
        """One metrics line, each number under its own name."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()
