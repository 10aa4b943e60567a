"""Requests to a vLLM server, which are repeated while it does not answer."""

import json
import logging
import math
import os
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from kd_core.errors import UsageError

log = logging.getLogger("kd")
REQUEST_SECONDS, PATIENCE, LONGEST_PAUSE = 300.0, 300.0, 30.0
RETRIED = (408, 425, 429, 500, 502, 503, 504)
MOST_BYTES = 1 << 24  # of a reply without entries


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would hand the key to another host."""

    def redirect_request(self, *args: Any, **names: Any) -> None:
        del args, names


_OPENER = urllib.request.build_opener(_NoRedirects)


class VllmServer:
    """A server's address, and requests to it that are repeated while it does not answer."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.lock, self.failing_since = threading.Lock(), None

    def request_json(self, path: str, body: dict[str, Any] | None = None, most: int = MOST_BYTES) -> Any:
        """Sends a request and returns the JSON of the reply.

        Raises:
            UsageError: as `request`, or the reply is no JSON.
        """
        reply = self.request(path, body, most)
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            raise UsageError(f"{self.url}{path}: the reply is no JSON; wanted a vLLM server.") from None

    def request(self, path: str, body: dict[str, Any] | None = None, most: int = MOST_BYTES) -> bytes:
        """Sends a request and returns the reply, of at most `most` bytes.

        Raises:
            UsageError: the server refuses the request, answers with more, or has not answered any request for
                `PATIENCE` seconds.
        """
        pause, first_failure = 1.0, math.inf
        while True:
            try:
                reply = self._send(path, body, most)
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED:
                    raise UsageError(_refusal(f"{self.url}{path}", error, body or {})) from None
                reason = f"status {error.code}"
            except (OSError, HTTPException) as error:
                reason = str(error) or type(error).__name__
            else:
                self.failing_since = None
                return reply
            first_failure = min(first_failure, time.monotonic())
            self._check_patience(path, reason, first_failure)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _send(self, path: str, body: dict[str, Any] | None, most: int) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 (http and https alone)
        with _OPENER.open(request, timeout=REQUEST_SECONDS) as reply:
            text = reply.read(most + 1)
        if len(text) > most:
            raise UsageError(f"{self.url}{path}: the reply has more than {most} bytes; wanted a vLLM server.")
        return text

    def _check_patience(self, path: str, reason: str, first_failure: float) -> None:
        """Raises UsageError if this request, or all requests of all threads, have failed for too long."""
        with self.lock:
            if self.failing_since is None:
                self.failing_since = time.monotonic()
                log.warning("%s%s: no answer (%s), trying for %.0f seconds", self.url, path, reason, PATIENCE)
            waited = time.monotonic() - min(self.failing_since, first_failure)
        if waited > PATIENCE:
            raise UsageError(
                f"{self.url}{path}: no answer for {waited:.0f} seconds ({reason}). Start the server again, then run "
                "the same command, which goes on where it stopped."
            )


def _refusal(place: str, error: urllib.error.HTTPError, body: dict[str, Any]) -> str:
    """Returns a message for a request that the server refuses, with the flag of the server that would allow it."""
    try:
        reason = str(json.loads(error.read(1 << 16))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        reason = str(error.reason)
    top_k = body.get("prompt_logprobs")
    hint = ""
    if error.code == 404 and place.endswith("/pooling"):
        hint = ' Start the server with --runner pooling, or leave vllm={"runner": "pooling"} out.'
    elif error.code in (401, 403):
        hint = " Set the variable VLLM_API_KEY to the server's key."
    elif "prompt logprobs" in reason:
        hint = f" Start the server with --max-logprobs {top_k}, or set selection.top_k lower."
    elif "context length" in reason or "max_model_len" in reason:
        hint = f" Start the server with --max-model-len {len(body.get('prompt', ())) + 1}, or set row_length lower."
    return f"{place}: refused with status {error.code} ({reason:.400}).{hint}"
