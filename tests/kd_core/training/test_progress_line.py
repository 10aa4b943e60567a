"""The line that the terminal shows, and what it is made of."""

import logging
import resource

import pytest
import torch

from kd_core.parallel.world import World
from kd_core.training.monitoring.progress_line import ProgressLine, format_metrics, memory_gib


def test_the_line_has_losses_by_name_and_what_the_step_cost() -> None:
    values = {
        "train/kd_loss": 2.0,
        "train/loss": 1.5,
        "train/sft_loss": 3.25,
        "train/teacher_mass": 0.9,
        "train/lr": 4e-4,
        "speed/tokens_per_second": 1234.4,
        "speed/data_wait_share": 0.125,
        "speed/memory_gib": 3.5,
        "speed/eta_seconds": 3725.0,
    }
    wanted = "loss 1.500, kd 2.000, sft 3.250, lr 4.00e-04, 1234 tok/s, 12% waiting, 3.50 GiB, ETA 1:02:05"
    assert format_metrics(values) == wanted
    assert format_metrics({"train/skipped_steps": 1.0, "speed/eta_seconds": 5.0}) == "ETA 00:05"


def test_without_a_terminal_a_line_of_the_log_every_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kd"), ProgressLine(20, 3, 5, World()) as live:
        for step in range(4, 21):
            live.show(step, {"train/loss": float(step)})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"step {step} of 20" for step in (4, 5, 10, 15, 20)
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "kd"), ProgressLine(2, 0, 1, World(rank=1, size=2)) as live:
        live.show(1, {})
    assert not caplog.records


def test_shares_and_the_time_that_is_left() -> None:
    live = ProgressLine(12, 2, 1, World())
    live.started -= 1000.0  # seconds ago
    found = live.speed(4, seconds=3.0, waited=1.0)
    assert found["speed/data_wait_share"] == 0.25
    assert found["speed/eta_seconds"] == pytest.approx(500.0 * 8, rel=0.05)


def test_memory_is_that_of_this_process() -> None:
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(1 << 26)  # a quarter of a GiB
    after = memory_gib(torch.device("cpu"))
    assert 0.2 < after - before < 0.35
    assert after <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20) * 1.01
    assert len(held) == 1 << 26
