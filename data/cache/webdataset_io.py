"""Tar expander and sample grouper of webdataset. No other module imports webdataset.

Neither webdataset's opener of URLs nor its decoders are used: members stay bytes until the codec decodes them.
"""

import io

from webdataset.tariterators import group_by_keys, tar_file_expander

from data.cache.tar import END_OF_TAR, read_members


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
