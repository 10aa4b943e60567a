"""What we take of webdataset: its opener, expander and grouper. The one module that knows it.

`pipe:` and the like never get here (`location.py`), and none of its decoders is used: members stay bytes until ours.
"""

import io
import os
from typing import Any

from webdataset.gopen import Pipe, gopen, gopen_schemes
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.cache.tar import END_OF_TAR, read_members
from kd_core.errors import UsageError

REWRITE = "GOPEN_REWRITE"


def opened(url: str) -> Any:
    """A stream of the bytes of a file: an absolute path, or a URL of an allowed scheme.

    Raises:
        UsageError: the environment would have webdataset open something else.
        OSError: it cannot be opened.
    """
    if REWRITE in os.environ:
        raise UsageError(f"{url}: the environment variable {REWRITE} is set, which would open another file. Unset it.")
    return gopen(url)


def known_scheme(scheme: str) -> bool:
    """Whether webdataset opens such URLs."""
    return scheme in gopen_schemes


def exit_status(stream: Any) -> int | None:
    """How the program behind a stream that has ended did end; None where there is none."""
    return stream.proc.wait() if isinstance(stream, Pipe) else None


def stop(stream: Any) -> None:
    """End the program behind a stream, whoever reads it; the reader sees the end of the file."""
    if isinstance(stream, Pipe) and stream.proc.poll() is None:
        stream.proc.kill()


def close(stream: Any) -> None:
    """Close a stream, read to its end or not."""
    stop(stream)
    if isinstance(stream, Pipe):
        stream.ignore_errors = True
    stream.close()


def _reraise(error: Exception) -> bool:
    raise error


def members_of(data: bytes, url: str) -> dict[str, bytes]:
    """Members of a block by suffix, by webdataset.

    Raises:
        ValueError: it is not one sample of plain files, each once.
    """
    names = [member.name for member in read_members(data)]  # refuses all but plain files first
    if len(set(names)) != len(names):
        raise ValueError(f"has a member twice: {sorted(names)}")
    sources = [{"url": url, "stream": io.BytesIO(data + END_OF_TAR)}]
    samples = list(group_by_keys(tar_file_expander(sources, handler=_reraise), handler=_reraise))
    if len(samples) != 1:
        raise ValueError(f"holds {len(samples)} samples, wanted 1")
    return {suffix: payload for suffix, payload in samples[0].items() if not suffix.startswith("__")}
