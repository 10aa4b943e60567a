"""Two hosts, as network namespaces of this machine, that share nothing but a bucket of an S3 server.

They export together and train from it. The teacher and the corpus lie in a folder that both can read.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from kd_core.training.monitoring.metric_log import read_metrics
from tests.forks import ROOT
from tests.launchers.command import configs
from tests.patience import patience
from tests.s3 import KEY, REGION, SECRET, free_port
from tests.tiny import Tiny, bytes_of

NAMES = [f"kd{os.getpid()}a", f"kd{os.getpid()}b"]
ADDRESSES = ["10.77.9.1", "10.77.9.2"]
BUCKET = "s3://bucket/caches"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


@pytest.fixture
def hosts() -> Generator[list[str]]:
    """Names of two namespaces, joined by a wire, that know each other's names."""
    try:
        for name in NAMES:
            _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        _remove()
        pytest.skip("network namespaces are not permitted here")
    try:
        _ip("link", "add", "wire1", "netns", NAMES[0], "type", "veth", "peer", "name", "wire2", "netns", NAMES[1])
        known = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True), 1):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"wire{number}")
            _ip("-n", name, "link", "set", f"wire{number}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            (folder := Path("/etc/netns") / name).mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        yield NAMES
    finally:
        _remove()


def _on_hosts(hosts: Sequence[str], port: int, module: str, *arguments: str) -> None:
    """Runs a command under torchrun, one rank a host, and expects that it succeeds."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": REGION, "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": f"http://{ADDRESSES[0]}:{port}", "no_proxy": "*",
    }  # fmt: skip
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", f"{hosts[0]}:29558", "--rdzv-id", "7", "-m", module, *arguments,
    ]  # fmt: skip
    # Each host has a name of its own, by which the other finds it.
    named = 'hostname "$0" && exec "$@"'
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", "-u", "sh", "-c", named, host, *torchrun],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in hosts
    ]  # fmt: skip
    try:
        output = [rank.communicate(timeout=patience(120))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], output


@pytest.mark.slow
def test_two_hosts_export_into_a_bucket_and_train_from_it(tiny: Tiny, hosts: list[str], tmp_path: Path) -> None:
    (folder := tmp_path / "buckets" / "bucket").mkdir(parents=True)
    port = free_port()
    script = Path(sys.executable).with_name("localbucket")
    serve = [script, "--host", ADDRESSES[0], "--port", str(port), str(folder.parent)]
    server = subprocess.Popen(
        ["ip", "netns", "exec", hosts[0], *serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    export = [
        "quickstart_export", f"corpus.path={tiny.corpus}", f"teacher={tiny.teacher}", "train_tokens=none",
        "validation_tokens=none", "selection.top_k=8", "row_length=32", "validation_share=0.2", "block_positions=128",
        "shard_bytes=4096", "dtype=float32", "batch_rows=3",
    ]  # fmt: skip
    try:
        _on_hosts(hosts, port, "launchers.export_teacher", *configs(export), f"--out={BUCKET}")
        assert bytes_of(folder / "caches") == bytes_of(tiny.root / "cache"), "as one host exports into a folder"
        items = [item.replace(f"{tiny.root}/cache", BUCKET) for item in tiny.train_items(2)]
        items += ["shards.block_cache=none", "evaluation.shards.block_cache=none"]
        _on_hosts(hosts, port, "launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}")
    finally:
        server.kill()
        server.wait()
    _on_one = [sys.executable, "-m", "launchers.train", *configs(tiny.train_items(2)), f"--run_dir={tmp_path / 'one'}"]
    subprocess.run(_on_one, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    losses = [
        [line["train/loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if "train/loss" in line]
        for run in ("run", "one")
    ]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
