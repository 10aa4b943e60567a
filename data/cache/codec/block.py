"""A block: some thousands of positions, whole records of them, as the members of one sample of a tar.

    NAME.json            what is in it: records, sizes of planes, the codec's error   (all below: zstd of planes)
    NAME.tokens.zst      token ids of all records, T + 1 each, as global ranks; loss masks, a bit each
    NAME.entries.zst     entries a position; their ids by ranks.py                    (not where the head is empty)
    NAME.log_probs.zst   levels of the entries; tail; labels that are no entry; tails at further temperatures
    NAME.samples.zst     samples a position; their ids by ranks.py; multiplicities    (where there are samples)

Every plane is described in `data/README.md`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.entries import Entries, decode_entries
from data.cache.codec.header import Header, check_size
from data.cache.codec.log_probs import LogProbs, decode_log_probs, log_prob_planes
from data.cache.codec.planes import compress, decompress, join, split, width_of
from data.cache.codec.rank_tables import Tables
from data.cache.codec.ranks import Ragged
from data.cache.codec.samples import decode_weights, plane_count, weight_planes
from data.cache.columns import Columns, audit
from data.cache.record import Record
from kd_core.json_fields import fields

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]
INPUTS, LABELS = slice(None, -1), slice(1, None)


def encode_block(first: int, records: Sequence[Record], coding: Coding) -> tuple[dict[str, bytes], dict[str, float]]:
    """Members by suffix, and what coding changed. Records are named by number, from `first` on.

    Raises:
        ValueError: a record holds what no teacher can have said.
    """
    tables, selection = coding.tables, coding.selection
    columns = Columns.of(records, selection.tail_temperatures)
    columns.check(tables.vocab_size, selection)
    check_size(len(columns.tokens), max(columns.heads.shape[1], columns.samples.shape[1]))
    order = coding.order_of(columns.tokens)
    head = Entries(columns.tokens, columns.heads, columns.head_logs, tables)
    drawn = Entries(columns.tokens, columns.samples, columns.sample_logs, tables)
    ids = tables.rank_of.take(np.concatenate([record.token_ids for record in records]).astype(np.int64))
    masks = np.packbits(np.concatenate([record.loss_mask for record in records]))
    planes: dict[str, Planes] = {
        "tokens.zst": [*split(ids, width_of(tables.vocab_size)), masks],
        "entries.zst": head.planes(order, tables),
        "log_probs.zst": log_prob_planes(columns, head, coding.levels),
        "samples.zst": [*drawn.planes(order, tables), *weight_planes(drawn, columns.tail, selection)],
    }
    header: dict[str, Any] = {
        "entries": head.rows.K,
        "first": first,
        "planes": {name: [len(plane) for plane in planes[name]] for name in coding.members[1:]},
        "records": [[record.document, record.start, record.positions] for record in records],
        "samples": drawn.rows.K,
    }
    members = {name: compress(planes[name]) for name in coding.members[1:]}
    again = decode_block({"json": json.dumps(header).encode(), **members}, coding)
    header["audit"] = audit(columns, Columns.of(again, selection.tail_temperatures))
    return {"json": json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), **members}, header["audit"]


def decode_block(members: dict[str, bytes], coding: Coding) -> list[Record]:
    """The records of a block; strict.

    Raises:
        ValueError: a member is missing, unknown, damaged, of another size, or holds an impossible value; the message
            names the member.
    """
    if set(members) != set(coding.members):
        raise ValueError(f"has members {sorted(members)}; wanted {sorted(coding.members)}")
    header, member = Header.of(members["json"]), "json"
    try:
        fields(header.planes, "planes", coding.members[1:])
        planes: dict[str, Planes] = {}
        for member in coding.members[1:]:
            sizes = header.sizes(member, len(coding.selection.tail_temperatures))
            planes[member] = decompress(members[member], sizes)
        member = "tokens.zst"
        token_ids, masks = _decode_tokens(planes[member], header, coding.tables)
        tokens, labels = (np.concatenate([ids[part] for ids in token_ids]) for part in (INPUTS, LABELS))
        member = "entries.zst"
        ids, rows = _decode_head(planes, tokens, header, coding)
        member = "log_probs.zst"
        logs = decode_log_probs(planes[member], ids, labels, rows, coding)
        member = "samples.zst"
        samples = _decode_samples(planes, tokens, logs.tail, header, coding)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{member}: {error}") from None
    whole = _Block(ids, logs, samples, dict(zip(coding.selection.tail_temperatures, logs.tempered, strict=True)))
    return [
        whole.record(f"{header.first + i:08d}", header.records[i][:2], token_ids[i], masks[i], at)
        for i, at in enumerate(_slices(header))
    ]


def _slices(header: Header) -> Iterator[slice]:
    """The positions of each record."""
    start = 0
    for _, _, positions in header.records:
        yield slice(start, start := start + positions)


def _decode_tokens(planes: Planes, header: Header, tables: Tables) -> tuple[list[Array], list[Array]]:
    """Token ids and loss mask of each record."""
    *ranks, bits = planes
    if len(ranks) != width_of(tables.vocab_size):
        raise ValueError(f"has {len(planes)} planes, wanted {width_of(tables.vocab_size) + 1}")
    lengths = np.array([positions for _, _, positions in header.records])
    flat = join(ranks)
    if len(flat) != (lengths + 1).sum() or len(bits) != (lengths.sum() + 7) // 8:
        raise ValueError(f"has {len(flat)} tokens and {8 * len(bits)} mask bits for {lengths.sum()} positions")
    if int(flat.max()) >= tables.vocab_size:
        raise ValueError(f"holds rank {flat.max()}; the vocabulary has {tables.vocab_size}")
    mask = np.unpackbits(bits)[: lengths.sum()]
    return (
        np.split(tables.ids.take(flat), np.cumsum(lengths + 1)[:-1]),
        np.split(mask, np.cumsum(lengths)[:-1]),
    )


def _decode_head(planes: dict[str, Planes], tokens: Array, header: Header, coding: Coding) -> tuple[Array, Ragged]:
    """Ids of the head; [T, 0] where it is empty."""
    if "entries.zst" in planes:
        return decode_entries(planes["entries.zst"], tokens, header.entries, coding)
    return np.zeros((len(tokens), 0), np.int32), Ragged.of(np.zeros(len(tokens), np.int64), 0)


def _decode_samples(
    planes: dict[str, Planes], tokens: Array, tail: Array, header: Header, coding: Coding
) -> tuple[Array, Array] | None:
    """Ids and log weights of the samples, where there are any."""
    if "samples.zst" not in planes:
        return None
    weights = plane_count(coding.selection)
    of_ids, of_weights = planes["samples.zst"][:-weights], planes["samples.zst"][-weights:]
    ids, rows = decode_entries(of_ids, tokens, header.samples, coding)
    return ids, decode_weights(of_weights, rows, tail, coding.selection)


@dataclass(frozen=True)
class _Block:
    """All positions of a block; its records are views of it."""

    ids: Array
    logs: LogProbs
    samples: tuple[Array, Array] | None
    tempered: dict[float, Array]

    def record(self, name: str, place: tuple[str, int], token_ids: Array, loss_mask: Array, at: slice) -> Record:
        """The record that lies at these positions."""
        return Record(
            name=name,
            document=place[0],
            start=place[1],
            token_ids=token_ids,
            loss_mask=loss_mask,
            topk_token_ids=self.ids[at],
            topk_log_probs=self.logs.head[at],
            tail_log_prob=self.logs.tail[at],
            label_log_prob=self.logs.labels[at],
            tempered_tails={temperature: tail[at] for temperature, tail in self.tempered.items()},
            sampled_token_ids=self.samples[0][at] if self.samples else None,
            sampled_log_weights=self.samples[1][at] if self.samples else None,
        )
