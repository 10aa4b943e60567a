"""A session on a device: time that is left, timing, peak memory, and a file of numbers."""

import contextlib
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

R = TypeVar("R")
# Peaks in bfloat16, of which MFU is a share, by a word of the GPU's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


def peak_flops(device_name: str) -> float | None:
    """Returns the peak of a GPU in bfloat16, or None where it is not listed."""
    return next((PEAK_FLOPS[word] for word in device_name.split() if word in PEAK_FLOPS), None)


@dataclass
class Session:
    """One device, the folder of its results, and how many seconds may pass. `tiny` is for a trial on a CPU."""

    device: torch.device
    out: Path
    seconds: float
    tiny: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    def mfu(self, flops: float, ms: float) -> dict[str, float]:
        """Returns the share of the peak at which `flops` take `ms`, or nothing where the peak is not known."""
        peak = peak_flops(self.device_name)
        return {"mfu": flops / ms * 1e3 / peak} if peak else {}

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def record(self, part: str, name: str, **values: Any) -> None:
        """Appends a line to `numbers.jsonl`, at once, and prints it."""
        line = {"part": part, "name": name, "at": round(time.monotonic() - self.began, 1), **values}
        with (self.out / "numbers.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()), flush=True)

    def wait(self) -> None:
        """Waits until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], rounds: int = 5, warm_up: int = 2) -> float:
        """Returns the median time of `work`, the device idle before and after."""
        for _ in range(warm_up):
            work()
        times: list[float] = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    @contextlib.contextmanager
    def peak_gib(self) -> Generator[list[float]]:
        """Yields a list that gets the most memory that the block has allocated above what was there (0 on a CPU)."""
        peak: list[float] = []
        before = 0
        if self.on_gpu:
            self.wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        yield peak
        peak.append((torch.cuda.max_memory_allocated(self.device) - before) / 2**30 if self.on_gpu else 0.0)

    def launches(self, work: Callable[[], object]) -> int:
        """Counts the kernels that `work` launches, copies and fills by the driver left out (0 on a CPU)."""
        if not self.on_gpu:
            return 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            self.wait()
        events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.count for event in events if not event.key.startswith(("Memcpy", "Memset")))

    def waits(self, work: Callable[[], object]) -> list[str]:
        """Returns the lines at which torch makes the host wait for the device (none on a CPU)."""
        if not self.on_gpu:
            work()
            return []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]

    def attempt(self, part: str, name: str, work: Callable[[], R], **values: Any) -> R | None:
        """Returns the result of `work`, or records its error beside `values` and returns None: the rest goes on."""
        try:
            return work()
        except Exception as error:
            self.record(part, name, **values, failed=f"{type(error).__name__}: {error}"[:300])
            return None
        finally:
            # After an error of a kernel, every later call of CUDA raises it again.
            with contextlib.suppress(RuntimeError):
                if self.on_gpu:
                    torch.cuda.empty_cache()
