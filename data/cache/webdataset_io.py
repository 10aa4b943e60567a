"""Opener, tar expander and sample grouper of webdataset. No other module imports webdataset.

`storage.py` refuses `pipe:` and similar URLs before they reach this module. None of webdataset's decoders is used:
members stay bytes until the codec decodes them.
"""

import io
import os
from typing import Any

from webdataset.gopen import Pipe, gopen, gopen_schemes
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.cache.tar import END_OF_TAR, read_members
from kd_core.errors import UsageError

REWRITE = "GOPEN_REWRITE"


def open_stream(url: str) -> Any:
    """Opens a stream of the bytes of a file: an absolute path, or a URL of an allowed scheme.

    Raises:
        UsageError: an environment variable would make webdataset open another file.
        OSError: the file cannot be opened.
    """
    if REWRITE in os.environ:
        raise UsageError(f"{url}: the environment variable {REWRITE} is set, which would open another file. Unset it.")
    return gopen(url)


def is_supported_scheme(scheme: str) -> bool:
    """Returns True if webdataset opens URLs of a scheme."""
    return scheme in gopen_schemes


def exit_status(stream: Any) -> int | None:
    """Waits for the program behind a stream, and returns its exit status. Returns None if there is no program."""
    return stream.proc.wait() if isinstance(stream, Pipe) else None


def kill_program(stream: Any) -> None:
    """Kills the program behind a stream, from any thread. A thread that reads the stream then gets its end."""
    if isinstance(stream, Pipe) and stream.proc.poll() is None:
        stream.proc.kill()


def close(stream: Any) -> None:
    """Closes a stream, also before its end, and stops its program."""
    kill_program(stream)
    if isinstance(stream, Pipe):
        stream.ignore_errors = True
    stream.close()


def _reraise(error: Exception) -> bool:
    raise error


def read_block_members(data: bytes, url: str) -> dict[str, bytes]:
    """Returns the members of a block by suffix, as webdataset groups them.

    Raises:
        ValueError: the data are not one sample of plain files with distinct names.
    """
    names = [member.name for member in read_members(data)]  # first refuses all but plain files
    if len(set(names)) != len(names):
        raise ValueError(f"has a member twice: {sorted(names)}")
    sources = [{"url": url, "stream": io.BytesIO(data + END_OF_TAR)}]
    samples = list(group_by_keys(tar_file_expander(sources, handler=_reraise), handler=_reraise))
    if len(samples) != 1:
        raise ValueError(f"holds {len(samples)} samples, wanted 1")
    return {suffix: payload for suffix, payload in samples[0].items() if not suffix.startswith("__")}
