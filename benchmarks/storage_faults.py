"""Faults of an S3 server at random moments of a small training run: are records wrong, does anything hang or differ?

    OMP_NUM_THREADS=1 python -m benchmarks.storage_faults --trials 20

Each trial trains from a bucket, while the server fails at a random moment in one of four ways: killed and back after a
second, killed for good, slow (300 ms a request and 1 Mbit/s), or with other credentials. A run that stops is started
again on a sound server, until it ends. Its losses and weights are then compared with those of a run from a folder,
which uses no server, bit for bit. A trial hangs if an attempt takes longer than the stated time to retry and
`SLACK` seconds more than the undisturbed run.

Blocks are read one at a time, as they are needed, so that the server is asked all through the run.
"""

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import fiddle as fdl
import numpy as np
import pytest
import torch

from data.cache.object_storage import ObjectStorage
from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.students.starts.start import build_student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.s3 import free_port, hadro, use_server
from tests.tiny import Tiny, make_tiny

STEPS, RETRY_SECONDS, SLACK = 30, 4.0, 10.0
KINDS = ("killed, back after 1 s", "killed for good", "slow", "other credentials")
SLOW = ("--latency-ms", "300", "--bandwidth-mbps", "1")


class Outcome(NamedTuple):
    """Losses by step and all weights of a run."""

    losses: dict[int, float]
    weights: list[torch.Tensor]


def items(tiny: Tiny, path: str) -> list[str]:
    return [
        *tiny.train_items(STEPS), f"shards.path={path}", f"shards.retry_seconds={RETRY_SECONDS}", "shards.prefetch=1",
        "shards.block_cache=None", "checkpoint.every=100", "logger.every=1",
        "evaluation.every=100",
    ]  # fmt: skip


def train(tiny: Tiny, folder: Path, path: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    experiment = fdl.build(config_items.resolve_items(items(tiny, path), "Experiment").config)
    experiment.run(RunFolder(folder), World(), StopSignals())


def outcome(tiny: Tiny, folder: Path) -> Outcome:
    start = fdl.build(config_items.resolve_items(items(tiny, str(tiny.train)), "Experiment").config).student
    model = build_student(start, torch.device("cpu"), 0)
    checkpoint.load_model(folder / "checkpoints" / f"step_{STEPS:08d}", model)
    lines = read_metrics(folder / "metrics.jsonl")
    return Outcome(
        {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}, list(model.parameters())
    )


def equal(one: Outcome, other: Outcome) -> bool:
    return one.losses == other.losses and all(map(torch.equal, one.weights, other.weights))


class Server:
    """A server that is sound, then fails in one way after some seconds."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port, self.running, self.ended = root, port, ExitStack(), threading.Event()

    def start(self, *faults: str) -> None:
        self.running.enter_context(hadro(self.root, self.port, *faults))

    def stop(self) -> None:
        self.running.close()

    def fail(self, kind: str, after: float) -> None:
        if self.ended.wait(after):
            return
        self.stop()
        if kind == "slow":
            self.start(*SLOW)
        elif kind == "other credentials":
            self.start("--secret-key", "another")
        elif kind != "killed for good" and not self.ended.wait(1.0):
            self.start()


def attempt(tiny: Tiny, folder: Path, server: Server, kind: str | None, after: float) -> tuple[str, float]:
    """Trains once, with a fault. Returns the message of a run that stopped, or nothing, and the seconds."""
    server.ended.clear()
    thread = threading.Thread(target=server.fail, args=(kind, after))
    server.start()
    started, message = time.monotonic(), ""
    if kind:
        thread.start()
    try:
        train(tiny, folder, "s3://cache/train")
    except UsageError as error:
        message = str(error)
    seconds = time.monotonic() - started
    server.ended.set()
    if kind:
        thread.join()
    server.stop()
    return message, seconds


def show(counts: Counter[tuple[str, str]], messages: Counter[str], usual: float) -> None:
    """Prints the table of all trials."""
    columns = ("trials", "stopped", "slowest s", "hung", "names no object", "did not end", "not bit-equal")
    print(f"\n{STEPS} steps, {usual:.1f} s undisturbed, shards.retry_seconds={RETRY_SECONDS:g}; {platform.machine()}, "
          f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()}\n")  # fmt: skip
    print(f"| fault | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(str(counts[kind, column]) for column in columns)} |")
    print("\nMessages:", *(f"- {text} ({number})" for text, number in messages.items()), sep="\n")
    bad = sum(counts[kind, column] for kind in KINDS for column in columns[3:])
    print(f"\nwrong, hung or unnamed: wanted 0, seen {bad}: {'no' if bad else 'yes'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no trial begins later")
    asked = parser.parse_args()
    chance, counts, messages = np.random.default_rng(asked.seed), Counter[tuple[str, str]](), Counter[str]()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as environment:
        root, port = Path(temporary), free_port()
        use_server(environment, port)
        environment.setattr(ObjectStorage, "read_ahead", 1)
        tiny = make_tiny(root / "tiny")
        train(tiny, root / "folder", str(tiny.train))
        wanted, server = outcome(tiny, root / "folder"), Server(tiny.root, port)
        message, usual = attempt(tiny, root / "undisturbed", server, None, 0)
        assert not message, message
        assert equal(outcome(tiny, root / "undisturbed"), wanted)
        deadline = time.monotonic() + 60 * asked.minutes
        for trial in range(asked.trials):
            if time.monotonic() > deadline:
                break
            kind, folder = KINDS[trial % len(KINDS)], root / f"run{trial}"
            message, seconds = attempt(tiny, folder, server, kind, chance.uniform(0, usual))
            counts[kind, "trials"] += 1
            counts[kind, "stopped"] += bool(message)
            counts[kind, "hung"] += seconds > usual * 2 + RETRY_SECONDS + SLACK and kind != "slow"
            counts[kind, "slowest s"] = max(counts[kind, "slowest s"], round(seconds))
            if message:
                messages[message.partition(": ")[2].partition(". ")[0].partition(" for ")[0]] += 1
                counts[kind, "names no object"] += "s3://cache/train/" not in message
            unended = attempt(tiny, folder, server, None, 0)[0] if message else ""
            is_equal = not unended and equal(outcome(tiny, folder), wanted)
            counts[kind, "did not end"] += bool(unended)
            counts[kind, "not bit-equal"] += not is_equal
            line = {"kind": kind, "seconds": round(seconds, 1), "message": message, "bit-equal": is_equal}
            print(json.dumps(line), flush=True)
    show(counts, messages, usual)


if __name__ == "__main__":
    main()
