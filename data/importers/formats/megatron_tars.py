"""The tars of Megatron-LM's offline logits: which samples each member holds, and whether all are there.

    tars, by their names ─► `_meta.json` of each: one run's ─► members, by their names ─► in the order of their samples

`data/importers/formats/megatron.py` describes the names and reads the members.
"""

import itertools
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.importers.settings import Chunk
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, open_plain, printable
from kd_core.json_fields import check_integer, check_object

log = logging.getLogger(__name__)
TAR_NAME = re.compile(r"(?:cp([0-9]{1,6})_)?dp([0-9]{1,6})__[0-9]{1,15}(?:-[0-9]{1,15})?\.tar")
MEMBER_NAME = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?\.pt\.zst")
META, MOST_META = "_meta.json", 1 << 20
NEWEST_VERSION = 2


class Place(NamedTuple):
    """The samples of a member: the first and the end, the rank, all ranks, and the micro-batch.

    V1 has its iteration as the start, and 0 as the end and as the micro-batch.
    """

    start: int
    end: int
    rank: int
    ranks: int
    micro_batch: int


class _Run(NamedTuple):
    """The run that wrote a tar, by its `_meta.json`. Ranks and micro-batch are 0 where it does not say them."""

    dataset: str
    version: int
    ranks: int
    micro_batch: int


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields name, first byte and size of each file of a tar."""
    with (
        open_plain(path, "a tar of Megatron-LM") as file,
        damage_as_usage_error(path, "a tar of Megatron-LM", "Copy it again"),
    ):
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        raise ValueError(f"{member.name!a:.100} is no plain file")
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)  # of the header that is none
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("ends before the mark of its end")
        except tarfile.TarError as error:
            raise UsageError(f"{printable(path)}: not a tar, or damaged ({error}). Copy it again.") from None


def read_member(path: Path, first: int, size: int) -> bytes:
    """Reads the bytes of a member.

    Raises:
        UsageError: the tar ends before them.
    """
    with open_plain(path, "a tar of Megatron-LM") as file:
        file.seek(first)
        payload = file.read(size)
    if len(payload) < size:
        raise UsageError(f"{printable(path)}: ends before byte {first + size}. Copy it again.")
    return payload


def _run(path: Path, member: tuple[str, int, int]) -> _Run:
    """Returns what `_meta.json`, the first member of a tar, says of its run."""
    with damage_as_usage_error(path, f"{META} of a tar of Megatron-LM", "Copy it again"):
        if member[0] != META or member[2] > MOST_META:
            raise ValueError(f"the first member is {member[0]!a:.100} of {member[2]} bytes; wanted {META}")
        meta = check_object(json.loads(read_member(path, *member[1:])), META)
        saver = check_object(meta.get("saver", {}), "saver")
        version = check_integer(saver.get("format_version", 1), "format_version", 1, NEWEST_VERSION)
        ranks, batch = (check_integer(saver.get(name, 0), name, 0, 1 << 20) for name in ("dp_size_save", "mbs_save"))
        return _Run(str(meta.get("hash")), version, ranks, batch)


def _tar_members(path: Path) -> Iterator[tuple[_Run, Place, Chunk]]:
    """Yields the members of a tar with its run and their places."""
    match = TAR_NAME.fullmatch(path.name)
    if not match:
        raise UsageError(f"{printable(path)}: wanted tars named dp0__0-128.tar, or cp0_dp0__15.tar as before.")
    if int(match[1] or 0):
        raise UsageError(
            f"{printable(path)}: holds a part of each sequence, of context-parallel rank {match[1]}. Megatron-LM reads "
            "only tars of rank 0 too. Save the teacher again without context parallelism, or with format version 2."
        )
    members, rank = _members(path), int(match[2])
    run = _run(path, next(members, ("nothing", 0, 0)))
    if run.ranks and rank >= run.ranks:
        raise UsageError(f"{printable(path)}: of rank {rank}; its {META} counts {run.ranks} ranks. Remove it.")
    for name, first, size in members:
        if not (samples := MEMBER_NAME.fullmatch(name)):
            raise UsageError(f"{printable(path)}: {name!a:.100} is no member that Megatron-LM writes. Copy it again.")
        if samples[2] and not (run.ranks and run.micro_batch):
            raise UsageError(f"{printable(path)}: {META} lacks dp_size_save and mbs_save. Copy it again.")
        place = Place(int(samples[1]), int(samples[2] or 0), rank, run.ranks, run.micro_batch if samples[2] else 0)
        yield run, place, Chunk(path, name, first, size)


def list_members(source: str, tars: list[Path]) -> Iterator[Chunk]:
    """Yields the members of all tars in the order of their samples. `numbers` of each is its `Place`.

    Raises:
        UsageError: tars are of two runs, or ranks or samples are missing or stand twice.
    """
    members = [item for path in tars for item in _tar_members(path)]
    for run, _, chunk in members:
        if run != members[0][0]:
            raise UsageError(
                f"{printable(chunk.path)}: its {META} is of another run than that of {printable(members[0][2].path)}. "
                "Name the tars of one run."
            )
    places = sorted(((place, chunk) for _, place, chunk in members), key=lambda item: (item[0].start, item[0].rank))
    ranks = 1 + max((place.rank for place, _ in places), default=-1)
    ranks = max([ranks, *(place.ranks for place, _ in places)])
    if missing := set(range(ranks)) - {place.rank for place, _ in places}:
        raise UsageError(f"{source}: no tar of rank {min(missing)} of {ranks}, dp{min(missing)}__…. Restore it.")
    _check_ranges(source, places, ranks)
    for place, chunk in places:
        yield Chunk(chunk.path, chunk.name, chunk.first, chunk.count, numbers=(*place._replace(ranks=ranks),))


def _check_ranges(source: str, members: list[tuple[Place, Chunk]], ranks: int) -> None:
    """Raises UsageError unless each rank's members follow each other and all ranks have the same ones."""
    unit, missing = "samples" if any(place.end for place, _ in members) else "iterations", ""
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for place, chunk in members:
        previous = ranges[place.rank][-1][1] if ranges[place.rank] else place.start
        if place.start < previous:
            raise UsageError(f"{printable(chunk.path)}: {chunk.name} holds samples of another tar too. Remove one.")
        if place.start > previous:
            missing = missing or f"{unit} {previous} to {place.start} of rank {place.rank}"
        ranges[place.rank].append((place.start, place.end or place.start + 1))
    for rank in range(ranks):
        if absent := set(itertools.chain(*ranges)) - set(ranges[rank]):
            missing = missing or f"{unit} {min(absent)[0]} to {min(absent)[1]} of rank {rank}"
    if missing:
        raise UsageError(f"{source}: {missing} are missing. Copy the tars again.")
    if ranges and ranges[0][0][0]:
        log.info("%s: begins with %s %d", source, unit, ranges[0][0][0])
