"""Storage: the same bytes from a folder, a web server, a bucket and the hub. Each failure names the object."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from obstore.exceptions import GenericError

from data.storage import object_storage
from data.storage.object_storage import is_loopback
from data.storage.storage import LocalStorage, Storage, is_url, storage_at
from data.stream.source import Shards
from kd_core.errors import UsageError
from tests.data.stream.server import serving
from tests.patience import patience
from tests.s3 import SECRET, free_port, hadro, localbucket, use_server

PAYLOAD = bytes(range(256)) * 40
NO_CREDENTIALS = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "AZURE_STORAGE_ACCOUNT_NAME",
]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NO_CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(object_storage, "FIRST_PAUSE", 0.05)
    monkeypatch.setitem(object_storage.RETRIES, "max_retries", 1)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of buckets, with one file of one cache."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket" / "cache").mkdir(parents=True)
    (root / "bucket" / "cache" / "shard.tar").write_bytes(PAYLOAD)
    return root


@pytest.fixture(scope="module")
def signing(bucket: Path) -> Generator[int]:
    """The port of a server that checks signatures."""
    port = free_port()
    with hadro(bucket, port):
        yield port


@pytest.fixture(scope="module")
def writable(bucket: Path) -> Generator[int]:
    """The port of a server that can be written to."""
    port = free_port()
    with localbucket(bucket, port):
        yield port


@pytest.mark.parametrize(
    "path",
    ["pipe:touch ran", "pipe:cat x |", "htgs://a/b", "hf://a/b", "hf://datasets/a", "ais://a/b", "file:///etc",
     "PIPE:touch ran",
     "Http://a/b", "http:a", "http://", "http://a/{b,c}", "http://a/[1-9]", "https://me:secret@a/b", "http://a/b?c=d",
     "S3://key:secret@b/x", "sftp://h/x?token=secret",
     "http://a/b#c", "gs://a/$(b)", "gs://a/b c", "gs://a/*", "http://a/../b", "https://-o/b", "a:b", "memory:///"],
)  # fmt: skip
def test_only_plain_urls_of_known_schemes_are_let_through(path: str) -> None:
    with pytest.raises(UsageError, match="wanted") as caught:
        Shards(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["a/b", "/a:b", "./a:b", "https://a.b:80/c-d/e_f.g", "gs://bucket/x", "s3://b_c/x", "az://c/x", "hf://datasets/a/b",
     "hf://datasets/a/b@v1.0/c/d"],
)  # fmt: skip
def test_folders_and_plain_urls_are_places_that_nothing_opens_yet(path: str) -> None:
    assert is_url(path) == (not path.startswith((".", "/", "a/")))
    assert Shards(path).path == path


def test_loopback_is_this_machine_alone() -> None:
    assert all(is_loopback(f"http://{host}:80/x") for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]"))
    assert not any(is_loopback(f"http://{host}/x") for host in ("localhost.evil.org", "10.0.0.1", "127.0.0.1.evil.org"))


def check_reads(storage: Storage, name: str = "shard.tar") -> None:
    """A storage that holds `PAYLOAD` under a name gives these bytes, and no others."""
    assert storage.size(name) == len(PAYLOAD)
    assert storage.read(name, len(PAYLOAD)) == PAYLOAD
    for offset, size in ((0, 10), (5, 1000), (len(PAYLOAD) - 3, 3), (len(PAYLOAD) - 3, 50), (len(PAYLOAD) + 7, 5)):
        assert storage.read_range(name, offset, size) == PAYLOAD[offset : offset + size]
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda offset: storage.read_range(name, offset, 700), range(0, 9000, 300))
        assert list(found) == [PAYLOAD[offset : offset + 700] for offset in range(0, 9000, 300)]
    assert storage.size("none") is None
    for read in (lambda: storage.read("none", 9), lambda: storage.read_range("none", 0, 9)):
        with pytest.raises(UsageError, match=r"/none: no such file"):
            read()
    with pytest.raises(UsageError, match=rf"{name}: has {len(PAYLOAD)} bytes, wanted at most 10"):
        storage.read(name, 10)


def check_writes(storage: Storage, stored: Path) -> None:
    """A storage writes files that are complete or absent, lists and deletes them."""
    large = os.urandom(9_000_000)  # more than one part of an upload
    storage.write("large", (large[start : start + 100_000] for start in range(0, len(large), 100_000)))
    storage.write("small", [b"a", b"b"])
    storage.write("small", [b"c"])
    assert (stored / "large").read_bytes() == large
    assert (stored / "small").read_bytes() == b"c"

    def breaks() -> Iterator[bytes]:
        yield large
        raise ValueError("the encoder broke")

    with pytest.raises(ValueError, match="the encoder broke"):
        storage.write("broken", breaks())
    assert storage.names() == ["large", "shard.tar", "small"]
    for name in ("large", "small", "small"):
        storage.delete(name)
    assert storage.names() == ["shard.tar"]
    assert storage.size("large") is None


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(PAYLOAD)
    (tmp_path / "below").mkdir()
    check_reads(LocalStorage(tmp_path))
    check_writes(LocalStorage(tmp_path), tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "shard.tar").write_bytes(PAYLOAD)
    storage, message = LocalStorage(tmp_path), rf"/shard.tar: cannot be read: {os.strerror(number)}. Check the disk"

    def breaks(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for method in ("open", "stat"):
        monkeypatch.setattr(Path, method, breaks)
        for read in (lambda: storage.read("shard.tar", 1 << 20), lambda: storage.read_range("shard.tar", 0, 9)):
            with pytest.raises(UsageError, match=message):
                read()
    with pytest.raises(UsageError, match=message):
        storage.start_read("shard.tar", 0, 9).result()


def test_a_bucket_with_signed_requests(signing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_server(monkeypatch, signing)
    check_reads(storage_at("s3://bucket/cache/"))
    assert storage_at("s3://bucket/cache").names() == ["shard.tar"]
    assert storage_at("s3://bucket").size("cache/shard.tar") == len(PAYLOAD)


def test_a_bucket_that_is_written(bucket: Path, writable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_server(monkeypatch, writable)
    check_writes(storage_at("s3://bucket/cache"), bucket / "bucket" / "cache")


def test_an_upload_is_repeated_and_has_no_file_that_a_kill_would_leave(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    use_server(monkeypatch, port := free_port())
    whole = bytes(range(256)) * 40_000  # of two parts

    def chunks() -> Iterator[bytes]:
        yield whole[:1000]
        assert not list(tmp_path.iterdir())
        yield whole[1000:]

    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(storage_at("s3://bucket/cache").write, "repeated", chunks())
        time.sleep(0.5)  # in which nobody listens
        with localbucket(bucket, port):
            writing.result(patience(20))
    assert (bucket / "bucket" / "cache" / "repeated").read_bytes() == whole


def test_a_web_server(bucket: Path) -> None:
    with serving(bucket / "bucket") as (url, _):
        storage = storage_at(f"{url}/cache")
        check_reads(storage)
        for change in (lambda: storage.write("x", [b""]), lambda: storage.delete("x"), storage.names):
            with pytest.raises(UsageError, match="cache(/x)?: this storage (is read only|does not list)"):
                change()


def test_a_server_without_ranges_is_an_error_and_never_other_bytes(bucket: Path) -> None:
    with serving(bucket / "bucket" / "cache") as (url, behaviour):
        behaviour.ranges = False
        assert storage_at(url).read("shard.tar", len(PAYLOAD)) == PAYLOAD
        with pytest.raises(UsageError, match=r"shard.tar: .* does not send parts of a file"):
            storage_at(url).read_range("shard.tar", 5, 10)


class Hub(BaseHTTPRequestHandler):
    """The two answers of the hub that a cache needs: a file by `resolve`, which redirects, and a listing by `tree`."""

    token = "hf_Xq7secretXq7"

    def do_HEAD(self) -> None:
        self._answer(True)

    def do_GET(self) -> None:
        self._answer(False)

    def _answer(self, head: bool) -> None:
        files = {"/datasets/me/caches/resolve/v1/train/shard.tar", "/datasets/me/caches/resolve/main/shard.tar"}
        if self.path.startswith("/blob/"):
            return self._send(206 if "Range" in self.headers else 200, PAYLOAD, head)
        if self.headers.get("authorization") != f"Bearer {self.token}":
            return self._send(401, b"", head)
        if self.path in files:
            return self._send(302, b"", head, ("Location", "/blob/1"))
        if self.path.startswith("/api/datasets/me/caches/tree/v1/train"):
            entries = [
                {"type": "file", "path": "train/shard.tar", "size": len(PAYLOAD), "oid": "0"},
                {"type": "directory", "path": "train/below", "oid": "1"},
            ]
            return self._send(200, json.dumps(entries).encode(), head)
        return self._send(404, b"", head)

    def _send(self, status: int, body: bytes, head: bool, *headers: tuple[str, str]) -> None:
        if status == 206:
            start, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            headers, body = (("Content-Range", f"bytes {start}-{min(end, 10239)}/{len(body)}"),), body[start : end + 1]
            status = status if body else 416
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body))), ("Content-Type", "application/json")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if head else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub.token
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_dataset_of_the_hub(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", hub)
    check_reads(storage_at("hf://datasets/me/caches@v1/train"))
    assert storage_at("hf://datasets/me/caches").size("shard.tar") == len(PAYLOAD)
    assert storage_at("hf://datasets/me/caches@v1/train").names() == ["shard.tar"]
    with pytest.raises(UsageError, match="hf://datasets/me/none: the hub does not list it"):
        storage_at("hf://datasets/me/none").names()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UsageError, match=r"caches/shard.tar: .* answers 401: it refuses access"):
        storage_at("hf://datasets/me/caches").read("shard.tar", 9)
    monkeypatch.setenv("HF_ENDPOINT", "http://10.0.0.1")
    with pytest.raises(UsageError, match="a token is not sent over plain http"):
        storage_at("hf://datasets/me/caches").read("shard.tar", 9)


def test_a_server_that_fails_for_a_while_is_waited_for(bucket: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(bucket / "bucket" / "cache") as (url, behaviour):
        behaviour.cut_short = 2
        assert storage_at(url).read_range("shard.tar", 100, 5000) == PAYLOAD[100:5100]
        behaviour.status, behaviour.failing = 503, 5
        assert storage_at(url, 60).read_range("shard.tar", 0, 10) == PAYLOAD[:10]
        assert "shard.tar: the server answers 503; trying again for" in caplog.text
        behaviour.failing = -1
        with pytest.raises(UsageError, match=r"shard.tar: cannot be .* for \d s: the server answers 503. Check"):
            storage_at(url, 2).read_range("shard.tar", 0, 10)
        behaviour.status = 0
        behaviour.hang = 10
        started = time.monotonic()
        with pytest.raises(UsageError, match=r"shard.tar: cannot be .* for \d s: it takes too long"):
            storage_at(url, 1).read_range("shard.tar", 0, 5000)
        assert time.monotonic() - started < patience(5)
    with pytest.raises(UsageError, match=r"shard.tar: cannot be .* for \d s: no connection"):
        storage_at(url, 2).read_range("shard.tar", 0, 10)


def _with_requests(storage: Storage, **requests: Callable[..., Awaitable[Any]]) -> Storage:
    """The storage, with a client of which these requests are others."""
    assert isinstance(storage, object_storage.ObjectStorage)
    vars(storage)["client"] = SimpleNamespace(**requests)
    return storage


def test_the_time_of_what_may_take_long_runs_from_its_first_failure() -> None:
    answers: list[GenericError | None] = [GenericError("kind: Interrupted"), None]

    async def head(name: str) -> dict[str, int]:
        await asyncio.sleep(0.8)
        if answer := answers.pop(0):
            raise answer
        return {"size": len(name)}

    assert _with_requests(storage_at("http://127.0.0.1:9/cache", 0.5), head_async=head).size("shard.tar") == 9


def test_a_service_of_credentials_may_fail_once_they_were_there(bucket: Path) -> None:
    failure = GenericError("error sending request for http://169.254.169.254/latest: kind: Timeout")
    answers: list[GenericError | None] = [failure, None, failure, None]

    async def get_range(name: str, start: int, length: int) -> bytes:
        if answer := answers.pop(0):
            raise answer
        return (bucket / "bucket" / "cache" / name).read_bytes()[start : start + length]

    storage = _with_requests(storage_at("http://127.0.0.1:9/cache", 20), get_range_async=get_range)
    with pytest.raises(UsageError, match="there are no credentials"):
        storage.read_range("shard.tar", 0, 10)
    assert storage.read_range("shard.tar", 0, 10) == PAYLOAD[:10]
    assert storage.read_range("shard.tar", 0, 10) == PAYLOAD[:10]
    assert not answers


def test_a_read_that_hangs_ends_when_it_is_cancelled(bucket: Path) -> None:
    with serving(bucket / "bucket" / "cache") as (url, behaviour):
        behaviour.hang = 1
        read = storage_at(url).start_read("shard.tar", 0, 5000)
        while not behaviour.asked:
            time.sleep(0.01)
        started = time.monotonic()
        read.cancel()
        with pytest.raises(CancelledError):
            read.result()
        assert time.monotonic() - started < patience(1)


def test_faults_of_a_bucket_change_no_byte(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    use_server(monkeypatch, port)
    storage = storage_at("s3://bucket/cache", 60)
    with hadro(bucket, port, "--error-rate", "0.4", "--fault-seed", "3", "--latency-ms", "2"):
        reads = [storage.start_read("shard.tar", offset, 500) for offset in range(0, 9000, 250)]
        assert [read.result() for read in reads] == [PAYLOAD[at : at + 500] for at in range(0, 9000, 250)]


def test_no_secret_is_in_an_error_or_a_log(
    signing: int, hub: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "Wq7secretWq7"
    messages: list[str] = []

    def fails(path: str, use: Callable[[Storage], object], cause: str) -> None:
        with pytest.raises(UsageError, match=cause) as caught:
            use(storage_at(path, 1))
        error: BaseException | None = caught.value
        while error is not None:
            messages.append(f"{error!s} {error!r} {error.__cause__ if error.__cause__ else ''}")
            error = error.__cause__
        assert path in messages[-1]

    def read(storage: Storage) -> object:
        return storage.read_range("shard.tar", 0, 9)

    use_server(monkeypatch, signing, wrong)
    fails("s3://bucket/cache", read, r"403 SignatureDoesNotMatch: it refuses access. Renew or correct the credentials")
    fails("s3://bucket/cache", lambda storage: storage.names(), "it refuses access")
    use_server(monkeypatch, signing)
    fails("s3://bucket/cache", lambda storage: storage.write("x", [b"1"]), "the server answers")
    fails("s3://none/cache", read, "no such file")
    use_server(monkeypatch, free_port())
    fails("s3://bucket/cache", read, "no connection")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.1:1")  # credentials are not sent in the clear
    fails("s3://bucket/cache", read, "credentials are not sent over plain http")
    monkeypatch.setenv("HF_TOKEN", wrong)
    fails("hf://datasets/me/caches", read, "refuses access")
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", f"sv=2020&sig={SECRET}")
    fails("az://container/cache", read, "there are no credentials, or no account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    fails("az://container/cache", read, "no connection")
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    fails("gs://bucket/cache", read, "no connection")
    assert len(messages) > 8
    for secret in (SECRET, wrong, hub):
        assert secret not in "\n".join(messages) + caplog.text


def test_a_forked_process_says_that_it_cannot_read(bucket: Path) -> None:
    script = (
        "import os, sys\nfrom data.storage.storage import storage_at\n"
        "storage = storage_at(sys.argv[1])\nassert storage.read_range('shard.tar', 0, 4) == bytes(range(4))\n"
        "child = os.fork()\nif child == 0:\n    try:\n        storage.read_range('shard.tar', 0, 4)\n"
        "    except ValueError as error:\n        os._exit(7 if 'forked' in str(error) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    with serving(bucket / "bucket" / "cache") as (url, _):
        ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script, url], timeout=60, check=False)
    assert ended.returncode == 7
