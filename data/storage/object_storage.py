"""Object storage (S3, GCS, Azure) and web servers, through obstore. No other module imports obstore.

Credentials, endpoints and regions come from the environment, as obstore reads them (docs/storage.md). Text of obstore's
errors is never shown, because a server's answer may hold anything. `describe_failure` takes from it a status, an error
code and the kind of a failure, which cannot be secrets.
"""

import asyncio
import ipaddress
import itertools
import logging
import os
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import GenericError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from data.storage.event_loop import submit
from data.storage.storage import missing, too_large
from kd_core.errors import UsageError

log = logging.getLogger("kd")
T = TypeVar("T")
READ_AHEAD = 64 << 20  # bytes
MOST_REQUESTS = 16  # requests of one cache at a time
# One attempt, within which obstore repeats what failed for a moment. Attempts follow each other until the time is up.
RETRIES = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
}
CLIENT = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "15m", "pool_idle_timeout": "20s"}
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between attempts
ENDPOINTS = {
    "s3": ("AWS", "_ENDPOINT(_URL(_S3)?)?"),
    "gs": ("GOOGLE", "_BASE_URL"),
    "az": ("AZURE", "(_STORAGE)?_ENDPOINT"),
}
CHUNK_BYTES = 8 << 20  # of a multipart upload
NETWORK_CAUSES = {
    "Connect": "no connection", "Timeout": "timed out", "Interrupted": "the connection broke",
    "Decode": "the answer broke off", "Request": "the request failed",
}  # fmt: skip
CREDENTIALS = "Renew or correct the credentials in the environment (docs/storage.md), then run the same command again."
REACH = "Check that it can be reached, then run the same command again."


class Failure(NamedTuple):
    """A failed request: its cause in words, what to do, and whether another attempt may succeed."""

    cause: str
    advice: str
    transient: bool


NO_CREDENTIALS = Failure("there are no credentials, or no account, in the environment", CREDENTIALS, False)
LATE_CREDENTIALS = Failure("the service of credentials does not answer", CREDENTIALS, True)
MARKED_FAILURES = {  # words in texts of obstore
    "BadScheme": Failure("credentials are not sent over plain http", "Set an https endpoint (docs/storage.md).", False),
    "MissingAccount": NO_CREDENTIALS,
    "169.254.169.254": NO_CREDENTIALS,  # the service that lends credentials to machines of a cloud
    "metadata.google": NO_CREDENTIALS,
}


def describe_failure(error: BaseException) -> Failure:
    """Returns what an error of obstore means, from its class, a status, an error code and the kind of a failure."""
    text = str(error)
    if isinstance(error, TimeoutError):
        return Failure("it takes too long", REACH, True)
    if isinstance(error, NotSupportedError):
        return Failure("the server does not send parts of a file", "Use one that does, or copy the cache.", False)
    if mark := next((mark for mark in MARKED_FAILURES if mark in text), None):
        return MARKED_FAILURES[mark]
    if status := re.search(r"status code: (\d{3})", text):
        code = re.search(r"<Code>([A-Za-z]{1,64})</Code>", text)
        return _describe_status(status[1], code[1] if code else "")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return Failure("it refuses access", CREDENTIALS, False)
    kind = re.search(r"kind: (Connect|Timeout|Interrupted|Decode|Request)\b", text)
    return Failure(NETWORK_CAUSES[kind[1]] if kind else f"no answer ({type(error).__name__})", REACH, True)


def _describe_status(status: str, code: str) -> Failure:
    answer = f"the server answers {status}{f' {code}' if code else ''}"
    if status in ("401", "403") or re.search("Token|Credential|Signature|AccessKey", code):
        return Failure(f"{answer}: it refuses access", CREDENTIALS, False)
    if status.startswith("3"):
        return Failure(f"{answer}: the bucket is elsewhere", "Set AWS_REGION or the endpoint of the bucket.", False)
    if status.startswith("4") and status not in ("408", "429"):
        return Failure(answer, "Check the URL and what the storage allows.", False)
    return Failure(answer, REACH, True)


def is_loopback(url: str) -> bool:
    """Returns True for a URL of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ObjectStorage:
    """Files of a client of obstore, with attempts until `retry_seconds` are up. Reading alone: see `BucketStorage`."""

    read_ahead = READ_AHEAD

    def __init__(self, url: str, retry_seconds: float) -> None:
        self.base, self.retry_seconds = url, retry_seconds
        self.slots: asyncio.Semaphore | None = None  # made on the event loop
        self.has_answered = False

    @cached_property
    def client(self) -> Any:
        """Opens the client of the first request. No request is made yet.

        Raises:
            UsageError: settings in the environment do not fit.
        """
        try:
            return self.open()
        except UsageError:
            raise
        except Exception as error:  # obstore checks the environment when it opens a client
            failure = describe_failure(error)
            raise UsageError(f"{self.base}: cannot be opened: {failure.cause}. {failure.advice}") from None

    def open(self) -> Any:
        """Returns a client of obstore."""
        raise NotImplementedError

    def url(self, name: str) -> str:
        return f"{self.base}/{name}"

    def size(self, name: str) -> int | None:
        async def head() -> int:
            return int((await self.client.head_async(name))["size"])

        try:
            return submit(self._attempts(name, head)).result()
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        raise UsageError(f"{self.base}: this storage does not list its files. Name a folder or a bucket.")

    def read(self, name: str, most: int) -> bytes:
        async def get() -> bytes:
            answer = await self.client.get_async(name)
            if (size := int(answer.meta["size"])) > most:
                raise too_large(self.url(name), most, size)
            return bytes(await answer.bytes_async())

        return self._result(name, submit(self._attempts(name, get)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self._result(name, self.start_read(name, offset, size))

    def start_read(self, name: str, offset: int, size: int) -> "Future[bytes]":
        return submit(self._read_range(name, offset, size))

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        del chunks
        raise UsageError(f"{self.url(name)}: this storage is read only. Write to a folder or bucket, then copy it.")

    def delete(self, name: str) -> None:
        self.write(name, ())

    def clean(self) -> None:
        pass

    def _result(self, name: str, future: "Future[T]") -> T:
        try:
            return future.result()
        except FileNotFoundError:
            raise missing(self.url(name)) from None
        finally:
            future.cancel()  # after an interrupt

    async def _read_range(self, name: str, offset: int, size: int) -> bytes:
        async def get() -> bytes:
            try:
                return bytes(await self.client.get_range_async(name, start=offset, length=size))
            except GenericError as error:
                if "status code: 416" in str(error):  # the file ends before the range
                    return b""
                raise

        try:
            return await self._attempts(name, get, is_short=True)
        except FileNotFoundError:
            raise missing(self.url(name)) from None

    async def _attempts(self, name: str, request: Callable[[], Awaitable[T]], *, is_short: bool = False) -> T:
        """Returns the result of a request, which is repeated while its failures may pass.

        Args:
            name: the file, for messages.
            request: starts an attempt.
            is_short: whether an attempt ends with `retry_seconds`, however slowly bytes arrive.

        Raises:
            FileNotFoundError: there is no such file.
            UsageError: the request failed for good, or for longer than `retry_seconds`.
        """
        self.slots = self.slots or asyncio.Semaphore(MOST_REQUESTS)
        # Of what may take long, such as an upload, the time runs from the first failure on.
        started, left, failure = time.monotonic() if is_short else None, self.retry_seconds, None
        for attempt in itertools.count():
            try:
                async with self.slots, asyncio.timeout(left if is_short else None):
                    result = await request()
                    self.has_answered = True
                    return result
            except (UsageError, FileNotFoundError):
                raise
            except Exception as error:
                # The end of the time is no cause where an earlier attempt had one.
                failure = failure if failure and isinstance(error, TimeoutError) else describe_failure(error)
                if failure is NO_CREDENTIALS and self.has_answered:
                    failure = LATE_CREDENTIALS
                started = started or time.monotonic()
                waited = time.monotonic() - started
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            left = self.retry_seconds - waited - pause
            if not failure.transient or left <= 0:
                raise self._error(name, failure, waited)
            log.warning("%s: %s; trying again for %.0f s", self.url(name), failure.cause, left)
            await asyncio.sleep(pause)
        raise AssertionError

    def _error(self, name: str, failure: Failure, waited: float) -> UsageError:
        duration = f" for {waited:.0f} s" if failure.transient else ""
        return UsageError(f"{self.url(name)}: cannot be reached or used{duration}: {failure.cause}. {failure.advice}")


def open_web_client(url: str, options: dict[str, Any]) -> Any:
    """Returns a client of a web server's folder, with further options of obstore's HTTP client."""
    return HTTPStore(url, client_options=cast(Any, {**CLIENT, **options}), retry_config=cast(Any, RETRIES))


class WebStorage(ObjectStorage):
    """A folder of a web server, without credentials. It cannot be listed or written."""

    def open(self) -> Any:
        return open_web_client(self.base, {"allow_http": True})


def _allows_http(scheme: str) -> bool:
    """Returns True if the environment names endpoints of this machine alone, or says that plain http is allowed."""
    prefix, endpoint = ENDPOINTS[scheme]
    endpoints = [value for name, value in os.environ.items() if re.fullmatch(prefix + endpoint, name)]
    is_allowed = os.environ.get(f"{prefix}_ALLOW_HTTP", "").lower() in ("1", "true")
    return is_allowed or (bool(endpoints) and all(map(is_loopback, endpoints)))


class BucketStorage(ObjectStorage):
    """A folder of a bucket of S3 or GCS, or of a container of Azure."""

    def open(self) -> Any:
        scheme = self.base.partition(":")[0]
        # Many servers of the S3 protocol know single deletions alone.
        config = {"config": {"disable_bulk_delete": True}} if scheme == "s3" else {}
        options = {"client_options": {**CLIENT, "allow_http": _allows_http(scheme)}, "retry_config": RETRIES, **config}
        return {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme].from_url(self.base, **cast(Any, options))

    def names(self) -> list[str]:
        async def list_files() -> list[str]:
            answer = await obstore.list_with_delimiter_async(self.client)
            return sorted(str(meta["path"]) for meta in answer["objects"])

        return self._result("", submit(self._attempts("", list_files)))

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        # The file is complete on this machine first, so that an upload can be repeated. It has no name, so that a
        # process that is killed leaves nothing.
        with tempfile.TemporaryFile() as file:
            file.writelines(chunks)

            async def put() -> None:
                file.seek(0)
                await self.client.put_async(name, file, chunk_size=CHUNK_BYTES)

            self._result(name, submit(self._attempts(name, put)))

    def delete(self, name: str) -> None:
        async def delete() -> None:
            await self.client.delete_async(name)

        try:
            submit(self._attempts(name, delete)).result()
        except FileNotFoundError:
            return
