"""Faults of an S3 server at random moments of a small run or export: are records wrong, does anything hang or differ?

    OMP_NUM_THREADS=1 python -m benchmarks.storage_faults --trials 20
    OMP_NUM_THREADS=1 python -m benchmarks.storage_faults --trials 20 --job export

Each trial trains from a bucket, or exports into one, while the server fails at a random moment in one of four ways:
killed and back after a second, killed for good, slow (300 ms a request and 1 Mbit/s), or with other credentials. A run
that stops is started again on a sound server, until it ends. Its losses and weights, or the files of its caches, are
then compared with those of one that uses a folder, bit for bit. A trial hangs if an attempt takes longer than the
stated time to retry and `SLACK` seconds more than twice the undisturbed run, and `SLOWER` more on a slow server.

Blocks are read one at a time, as they are needed, so that the server is asked all through the run.
"""

import argparse
import json
import os
import platform
import socket
import socketserver
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import fiddle as fdl
import numpy as np
import pytest
import torch

from data.storage.object_storage import ObjectStorage
from data.storage.storage import storage_at
from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.students.starts.start import build_student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.s3 import free_port, hadro, localbucket, use_server
from tests.tiny import Tiny, bytes_of, make_tiny, write_caches

STEPS, RETRY_SECONDS, SLACK, SLOWER = 30, 4.0, 10.0, 120.0  # seconds
KINDS = ("killed, back after 1 s", "killed for good", "slow", "other credentials")
REFUSED = b"<Error><Code>InvalidAccessKeyId</Code></Error>"
REFUSAL = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(REFUSED), REFUSED)
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

    def start(self, kind: str = "") -> None:
        """Starts it, sound or with a fault."""
        faults = {"slow": SLOW, "other credentials": ("--secret-key", "another")}.get(kind, ())
        self.running.enter_context(hadro(self.root, self.port, *faults))

    def stop(self) -> None:
        self.running.close()

    def fail(self, kind: str, after: float) -> None:
        if self.ended.wait(after):
            return
        self.stop()
        if kind in ("slow", "other credentials"):
            self.start(kind)
        elif kind != "killed for good" and not self.ended.wait(1.0):
            self.start()


class WritableServer(Server):
    """A server that can be written, behind a proxy that has the faults."""

    def start(self, kind: str = "") -> None:
        behind = free_port()
        self.running.enter_context(localbucket(self.root, behind))
        self.running.enter_context(proxy(self.port, behind, kind))


def pump(source: socket.socket, target: socket.socket, pause: float) -> None:
    """Passes bytes on until one side ends, with a pause of so many seconds for each byte."""
    with suppress(OSError):
        while chunk := source.recv(1 << 14):
            time.sleep(len(chunk) * pause)
            target.sendall(chunk)
    end(source, target)


def end(*connections: socket.socket) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(port: int, behind: int, kind: str) -> Generator[None]:
    """Passes requests on to a server, 300 ms late and at 1 Mbit/s, or refuses them, if `kind` says so."""
    connections: list[socket.socket] = []
    late, pause = (0.3, 8e-6) if kind == "slow" else (0, 0)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connections.append(self.request)
            if kind == "other credentials":
                self.request.recv(1 << 14)
                self.request.sendall(REFUSAL)
                return
            time.sleep(late)
            with socket.create_connection(("127.0.0.1", behind)) as upstream:
                back = threading.Thread(target=pump, args=(upstream, self.request, pause), daemon=True)
                back.start()
                pump(self.request, upstream, pause)
                back.join()

    class Proxy(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Proxy(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            end(*connections)


class Training:
    """A run of training from a bucket. Its losses and weights are those of a run from a folder."""

    def __init__(self, tiny: Tiny, root: Path, port: int) -> None:
        self.tiny, self.root, self.server = tiny, root, Server(tiny.root, port)
        train(tiny, root / "folder", str(tiny.train))
        self.wanted = outcome(tiny, root / "folder")

    def run(self, name: str) -> None:
        train(self.tiny, self.root / name, "s3://cache/train")

    def is_equal(self, name: str) -> bool:
        return equal(outcome(self.tiny, self.root / name), self.wanted)


class Exporting:
    """An export into a bucket. Its files are those of an export into a folder."""

    def __init__(self, tiny: Tiny, root: Path, port: int) -> None:
        (folder := root / "buckets" / "cache").mkdir(parents=True)
        self.tiny, self.bucket, self.server = tiny, folder, WritableServer(folder.parent, port)
        self.export = tiny.export(shard_bytes=1024)

    def run(self, name: str) -> None:
        write_caches(self.export, f"s3://cache/{name}")

    def is_equal(self, name: str) -> bool:
        whole = self.bucket.parent.parent / "whole"
        if not whole.exists():
            write_caches(self.export, whole)
        return bytes_of(self.bucket / name) == bytes_of(whole)


def attempt(job: Training | Exporting, name: str, kind: str | None, after: float) -> tuple[str, float]:
    """Runs once, with a fault. Returns the message of a run that stopped, or nothing, and the seconds."""
    job.server.ended.clear()
    thread = threading.Thread(target=job.server.fail, args=(kind, after))
    job.server.start()
    started, message = time.monotonic(), ""
    if kind:
        thread.start()
    try:
        job.run(name)
    except UsageError as error:
        message = str(error)
    seconds = time.monotonic() - started
    job.server.ended.set()
    if kind:
        thread.join()
    job.server.stop()
    return message, seconds


def show(job: str, counts: Counter[tuple[str, str]], messages: Counter[str], usual: float) -> None:
    """Prints the table of all trials."""
    columns = ("trials", "stopped", "slowest s", "hung", "names no object", "did not end", "not bit-equal")
    print(f"\n{job}, {usual:.1f} s undisturbed, requests are tried for {RETRY_SECONDS:g} s; {platform.machine()}, "
          f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()}\n")  # fmt: skip
    print(f"| fault | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(str(counts[kind, column]) for column in columns)} |")
    print("\nMessages:", *(f"- {text} ({number})" for text, number in messages.items()), sep="\n")
    bad = sum(counts[kind, column] for kind in KINDS for column in columns[3:])
    print(f"\nwrong, hung or unnamed: wanted 0, seen {bad}: {'no' if bad else 'yes'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=("training", "export"), default="training")
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
        environment.setattr(storage_at, "__defaults__", (RETRY_SECONDS,))
        job = {"training": Training, "export": Exporting}[asked.job](make_tiny(root / "tiny"), root, port)
        message, usual = attempt(job, "undisturbed", None, 0)
        assert not message, message
        assert job.is_equal("undisturbed")
        deadline = time.monotonic() + 60 * asked.minutes
        for trial in range(asked.trials):
            if time.monotonic() > deadline:
                break
            kind, name = KINDS[trial % len(KINDS)], f"run{trial}"
            message, seconds = attempt(job, name, kind, chance.uniform(0, usual))
            counts[kind, "trials"] += 1
            counts[kind, "stopped"] += bool(message)
            counts[kind, "hung"] += seconds > usual * 2 + RETRY_SECONDS + SLACK + SLOWER * (kind == "slow")
            counts[kind, "slowest s"] = max(counts[kind, "slowest s"], round(seconds))
            if message:
                messages[message.partition(": ")[2].partition(". ")[0].partition(" for ")[0]] += 1
                counts[kind, "names no object"] += "s3://cache/" not in message
            # What has ended without reading or writing after its fault is the same as without one.
            unended = attempt(job, name, None, 0)[0] if message else ""
            is_equal = not unended and job.is_equal(name)
            counts[kind, "did not end"] += bool(unended)
            counts[kind, "not bit-equal"] += not is_equal
            line = {"kind": kind, "seconds": round(seconds, 1), "message": message, "bit-equal": is_equal}
            print(json.dumps(line), flush=True)
    show(asked.job, counts, messages, usual)


if __name__ == "__main__":
    main()
