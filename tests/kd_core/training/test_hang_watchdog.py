import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kd_core.parallel.transfers import HostCopy
from kd_core.parallel.world import World
from kd_core.training.monitoring.hang_watchdog import Pulse, RankReport, _place, _Watch, hang_message, ranks_behind

WAITS = RankReport(9, "in forward and backward of step 5", 12, "kd_core/parallel/world.py:48", waits=True, host="a")


def test_who_does_not_answer_is_behind_before_all() -> None:
    reports = [WAITS, replace(WAITS, answers=False), replace(WAITS, entered=11)]
    assert ranks_behind(reports) == [1]
    assert "rank 1 on a, not answering" in hang_message(reports, 3.0)


def test_who_has_fewer_phases_behind_it() -> None:
    reports = [WAITS, WAITS, replace(WAITS, entered=11, phase="reading data of step 5", waits=False, host="c")]
    assert ranks_behind(reports) == [2]
    assert "waited 3 s for rank 2 on c, last seen reading data of step 5" in hang_message(reports, 3.0)
    assert "Rank 0 waits in forward and backward of step 5" in hang_message(reports, 3.0)


def test_who_is_in_no_collective() -> None:
    assert ranks_behind([WAITS, replace(WAITS, waits=False, place="kd_core/students/decoder/decoder.py:9")]) == [1]


def test_where_nothing_tells_them_apart_nobody_is_blamed() -> None:
    assert ranks_behind([WAITS, WAITS]) == []
    assert "no rank has moved for 3 s" in hang_message([WAITS, WAITS], 3.0)


def test_who_reads_numbers_of_a_gpu_waits() -> None:
    places: list[tuple[str, bool]] = []

    class Event:
        def synchronize(self) -> None:
            places.append(_place(sys._getframe(1)))

    copy = HostCopy(torch.zeros(1))
    copy.arrived = Event()  # pyright: ignore[reportAttributeAccessIssue]
    copy.read()
    [(place, waits)] = places
    assert place.startswith("kd_core/parallel/transfers.py:")
    assert waits
    assert not _place(sys._getframe())[1]


def test_a_rank_that_compares_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    slow, quick = (_Watch(World(rank, 2), store, Pulse(), timeout=5.0) for rank in range(2))
    read = slow._read

    def read_slowly() -> list[RankReport]:
        time.sleep(0.1)
        return read()

    monkeypatch.setattr(slow, "_read", read_slowly)
    slow._send()
    compares = threading.Thread(target=slow._compare)
    compares.start()
    quick._send()
    reports = quick._compare()
    compares.join()
    assert all(report.answers for report in reports)
