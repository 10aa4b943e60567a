"""Cache blocks: whole records of some thousands of positions, encoded as the members of one sample of a tar.

    records → Columns → ids as ranks, log-probs as levels → byte planes → one zstd frame per member → tar
                                                                │ decoded again before it is written
                                                                ▼ KL(original‖decoded), stored in NAME.json

    NAME.json            records, sizes of planes, the codec's error                  (all below: zstd of planes)
    NAME.tokens.zst      token ids of all records, T + 1 each, as global ranks; loss masks, a bit each
    NAME.entries.zst     top-K entries a position; their ids by ranks.py              (where top_k > 0)
    NAME.log_probs.zst   levels of the entries; tail; labels that are no entry; tails at further temperatures
    NAME.samples.zst     samples a position; their ids by ranks.py; multiplicities    (where draws > 0)

Every plane is described in `data/README.md`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.entries import RankedEntries, decode_entries
from data.cache.codec.header import Header, check_size
from data.cache.codec.log_probs import LogProbs, decode_log_probs, encode_log_probs
from data.cache.codec.planes import bytes_for, compress, decompress, join_planes, split_planes
from data.cache.codec.rank_tables import RankTables
from data.cache.codec.ranks import Ragged
from data.cache.codec.samples import decode_weights, encode_weights, weight_plane_count
from data.cache.columns import Columns, measure_codec_error
from data.cache.record import Record
from data.cache.tar import encode_member, read_members
from kd_core.json_fields import check_object

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]
INPUTS, LABELS = slice(None, -1), slice(1, None)


def encode_block(first: int, records: Sequence[Record], coding: Coding) -> tuple[dict[str, bytes], dict[str, float]]:
    """Encodes records as the members of a block, and decodes them again to measure the codec's error.

    Records are numbered from `first` on. Returns the members by suffix, and the audit of `measure_codec_error`.

    Raises:
        ValueError: a record holds values that no teacher can produce.
    """
    tables, selection = coding.tables, coding.selection
    # Lay all records end to end, and check them: N = Σ T positions.
    columns = Columns.from_records(records, selection.tail_temperatures)
    columns.check(tables.vocab_size, selection)
    check_size(len(columns.tokens), max(columns.entry_ids.shape[1], columns.samples.shape[1]))
    # Turn ids into ranks, and sort each position's entries by them.  [N, K] and [N, S]
    order = coding.order_of(columns.tokens)
    entries = RankedEntries(columns.tokens, columns.entry_ids, columns.entry_logs, tables)
    drawn = RankedEntries(columns.tokens, columns.samples, columns.sample_logs, tables)
    # Input tokens as global ranks, T + 1 a record, and loss masks as bits.  [N + records], [⌈N / 8⌉]
    token_ranks = tables.rank_of.take(np.concatenate([record.token_ids for record in records]).astype(np.int64))
    masks = np.packbits(np.concatenate([record.loss_mask for record in records]))
    planes: dict[str, Planes] = {
        "tokens.zst": [*split_planes(token_ranks, bytes_for(tables.vocab_size)), masks],
        "entries.zst": entries.planes(order, tables),
        "log_probs.zst": encode_log_probs(columns, entries, coding.levels),
        "samples.zst": [*drawn.planes(order, tables), *encode_weights(drawn, columns.tail, selection)],
    }
    header: dict[str, Any] = {
        "entries": entries.rows.K,
        "first": first,
        "planes": {name: [len(plane) for plane in planes[name]] for name in coding.members[1:]},
        "records": [[record.document, record.start, record.positions] for record in records],
        "samples": drawn.rows.K,
    }
    members = {name: compress(planes[name]) for name in coding.members[1:]}
    # Decode what was encoded, and compare: KL(original‖decoded) goes into the header.
    decoded = decode_block({"json": json.dumps(header).encode(), **members}, coding)
    header["audit"] = measure_codec_error(columns, Columns.from_records(decoded, selection.tail_temperatures))
    return {"json": json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), **members}, header["audit"]


def encode_block_members(first: int, records: Sequence[Record], coding: Coding, max_kl: float) -> bytes:
    """Encodes records as one block and returns its members as bytes of a tar.

    Raises:
        ValueError: a record holds values that no teacher can produce, or the codec's mean error on the block is above
            `max_kl` nats a position.
    """
    members, audit = encode_block(first, records, coding)
    if audit["kl_mean"] > max_kl:
        raise ValueError(
            f"codec {coding.codec!r} changes the teacher by {audit['kl_mean']:.1e} nats a position on the block of "
            f"record {first} (worst {audit['kl_worst']:.1e}); the bound is {max_kl:.1e} (max_codec_kl). "
            "Take codec=lossless, or raise the bound."
        )
    return b"".join(encode_member(f"{first:08d}.{suffix}", payload) for suffix, payload in members.items())


def renumber_block(block: bytes, first: int) -> bytes:
    """Returns a block with its records numbered from `first` on, as bytes of a tar."""
    members = {member.name.partition(".")[2]: member.payload for member in read_members(block)}
    header = {**json.loads(members["json"]), "first": first}
    members["json"] = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return b"".join(encode_member(f"{first:08d}.{suffix}", payload) for suffix, payload in members.items())


def decode_block(members: dict[str, bytes], coding: Coding) -> list[Record]:
    """Decodes the members of a block into its records, with every size and value checked.

    Raises:
        ValueError: a member is missing, unknown, damaged, of another size, or holds an impossible value. The message
            names the member.
    """
    if set(members) != set(coding.members):
        raise ValueError(f"has members {sorted(members)}; wanted {sorted(coding.members)}")
    header, member = Header.parse(members["json"]), "json"
    try:
        # `member` names the one that is being decoded, for the error message below.
        check_object(header.planes, "planes", coding.members[1:])
        planes: dict[str, Planes] = {}
        for member in coding.members[1:]:
            sizes = header.sizes(member, len(coding.selection.tail_temperatures))
            planes[member] = decompress(members[member], sizes)
        member = "tokens.zst"
        token_ids, masks = _decode_tokens(planes[member], header, coding.tables)
        # Inputs are the first T of a record's T + 1 tokens, labels the last T.  [N] each
        tokens, labels = (np.concatenate([ids[part] for ids in token_ids]) for part in (INPUTS, LABELS))
        member = "entries.zst"
        # Ids and log-probabilities of the top-K entries.  [N, K]
        ids, rows = _decode_ids(planes, tokens, header, coding)
        member = "log_probs.zst"
        logs = decode_log_probs(planes[member], ids, labels, rows, coding)
        member = "samples.zst"
        samples = _decode_samples(planes, tokens, logs.tail, header, coding)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{member}: {error}") from None
    # Cut the block into its records, without copies.
    block = _Block(ids, logs, samples, dict(zip(coding.selection.tail_temperatures, logs.tempered, strict=True)))
    return [
        block.record(f"{header.first + i:08d}", header.records[i][:2], token_ids[i], masks[i], chunk)
        for i, chunk in enumerate(_slices(header))
    ]


def _slices(header: Header) -> Iterator[slice]:
    """Yields the slice of the block's positions that each record takes."""
    start = 0
    for _, _, positions in header.records:
        yield slice(start, start := start + positions)


def _decode_tokens(planes: Planes, header: Header, tables: RankTables) -> tuple[list[Array], list[Array]]:
    """Returns the token ids [T + 1] and the loss mask [T] of each record."""
    *ranks, bits = planes
    if len(ranks) != bytes_for(tables.vocab_size):
        raise ValueError(f"has {len(planes)} planes, wanted {bytes_for(tables.vocab_size) + 1}")
    lengths = np.array([positions for _, _, positions in header.records])
    # Global ranks of all tokens of all records.  [Σ (T + 1)]
    flat = join_planes(ranks)
    if len(flat) != (lengths + 1).sum() or len(bits) != (lengths.sum() + 7) // 8:
        raise ValueError(f"has {len(flat)} tokens and {8 * len(bits)} mask bits for {lengths.sum()} positions")
    if int(flat.max()) >= tables.vocab_size:
        raise ValueError(f"holds rank {flat.max()}; the vocabulary has {tables.vocab_size}")
    # Drop the zeros that pad the last byte of the mask, then cut both at the ends of records.
    mask = np.unpackbits(bits)[: lengths.sum()]
    return (
        np.split(tables.ids.take(flat), np.cumsum(lengths + 1)[:-1]),
        np.split(mask, np.cumsum(lengths)[:-1]),
    )


def _decode_ids(planes: dict[str, Planes], tokens: Array, header: Header, coding: Coding) -> tuple[Array, Ragged]:
    """Returns the ids of the top-K entries [N, K] and which are used, or ids [N, 0] where none are stored."""
    if "entries.zst" in planes:
        return decode_entries(planes["entries.zst"], tokens, header.entries, coding)
    return np.zeros((len(tokens), 0), np.int32), Ragged.from_counts(np.zeros(len(tokens), np.int64), 0)


def _decode_samples(
    planes: dict[str, Planes], tokens: Array, tail: Array, header: Header, coding: Coding
) -> tuple[Array, Array] | None:
    """Returns the ids and the log importance weights of the samples [N, S], or None where none are stored."""
    if "samples.zst" not in planes:
        return None
    # The last planes of the member are those of the weights.
    weights = weight_plane_count(coding.selection)
    id_planes, planes_of_weights = planes["samples.zst"][:-weights], planes["samples.zst"][-weights:]
    ids, rows = decode_entries(id_planes, tokens, header.samples, coding)
    return ids, decode_weights(planes_of_weights, rows, tail, coding.selection)


@dataclass(frozen=True)
class _Block:
    """All N positions of a block. Its records are views of these arrays."""

    ids: Array
    logs: LogProbs
    samples: tuple[Array, Array] | None
    tempered: dict[float, Array]

    def record(self, name: str, place: tuple[str, int], token_ids: Array, loss_mask: Array, chunk: slice) -> Record:
        """Returns the record of positions `chunk`. `place` is its document and its first token there."""
        return Record(
            name=name,
            document=place[0],
            start=place[1],
            token_ids=token_ids,
            loss_mask=loss_mask,
            topk_token_ids=self.ids[chunk],
            topk_log_probs=self.logs.entries[chunk],
            tail_log_prob=self.logs.tail[chunk],
            label_log_prob=self.logs.labels[chunk],
            tempered_tails={temperature: tail[chunk] for temperature, tail in self.tempered.items()},
            sampled_token_ids=self.samples[0][chunk] if self.samples else None,
            sampled_log_weights=self.samples[1][chunk] if self.samples else None,
        )
