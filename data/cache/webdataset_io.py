"""webdataset's opener, tar expander and grouper. This is the one module that imports webdataset.

`storage.py` lets no `pipe:` or similar URL through to here. None of webdataset's decoders is used: members stay bytes
until our own decoder reads them.
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
    """Opens a byte stream of a file, named by an absolute path or by a URL of an allowed scheme.

    Raises:
        UsageError: the environment would make webdataset open another file.
        OSError: the file cannot be opened.
    """
    if REWRITE in os.environ:
        raise UsageError(f"{url}: the environment variable {REWRITE} is set, which would open another file. Unset it.")
    return gopen(url)


def is_known_scheme(scheme: str) -> bool:
    """Returns True where webdataset opens URLs of that scheme."""
    return scheme in gopen_schemes


def exit_status(stream: Any) -> int | None:
    """Returns the exit status of the program behind an ended stream, or None for a stream without a program."""
    return stream.proc.wait() if isinstance(stream, Pipe) else None


def stop(stream: Any) -> None:
    """Kills the program behind a stream, from any thread. A thread that reads the stream gets the end of the file."""
    if isinstance(stream, Pipe) and stream.proc.poll() is None:
        stream.proc.kill()


def close(stream: Any) -> None:
    """Closes a stream, whether it was read to its end or not."""
    stop(stream)
    if isinstance(stream, Pipe):
        stream.ignore_errors = True
    stream.close()


def _reraise(error: Exception) -> bool:
    raise error


def read_block_members(data: bytes, url: str) -> dict[str, bytes]:
    """Returns the members of a block by suffix, as webdataset groups them.

    Raises:
        ValueError: the bytes are not one sample of plain files, each once.
    """
    names = [member.name for member in read_members(data)]  # raises first for anything but plain files
    if len(set(names)) != len(names):
        raise ValueError(f"has a member twice: {sorted(names)}")
    sources = [{"url": url, "stream": io.BytesIO(data + END_OF_TAR)}]
    samples = list(group_by_keys(tar_file_expander(sources, handler=_reraise), handler=_reraise))
    if len(samples) != 1:
        raise ValueError(f"holds {len(samples)} samples, wanted 1")
    return {suffix: payload for suffix, payload in samples[0].items() if not suffix.startswith("__")}
