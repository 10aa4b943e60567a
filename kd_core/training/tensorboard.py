"""The one module that knows TensorBoard."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Events:
    """A folder of TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        self.writer = SummaryWriter(str(folder))

    def add(self, line: dict[str, float]) -> None:
        """One metrics line, each number under its own name."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(line["step"]))
        self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()
