"""`megatron`: Megatron-LM's cached log-probabilities of its offline distillation, tars of `LogitsSaverHooks`.

    V1  cp0_dp{D}__{I}.tar or dp{D}__{I}.tar    {iteration}.pt.zst     lists of tensors, one a micro-batch
    V2  dp{D}__{start}-{end}.tar                {start}-{end}.pt.zst   one tensor over the rank's samples

A member is a zstd frame around `torch.save` of a dict, read by torch's unpickler of weights, which knows tensors alone:

    values           log-probabilities, [T, samples, K]; −1000 and below where an entry is not used
    indices_low      the lower 16 bits of the ids, uint16, of the same shape
    bit_17           the bit above, as bools of the same shape, or packed eight a byte over all of them (V2)
    cu_seqlens_padded    V2, if texts are packed: where the texts of each sample begin and end

The tars have no tokens. `--tokens` names an .npy of [samples, T + 1] ids in the order of Megatron's samples, and
`--loss_mask` one of [samples, T] zeros and ones. Samples are dealt in turn: data-parallel rank d of D has micro-batches
d, d + D, d + 2D, … of an iteration.
"""

import io
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zstandard

from data.cache.record import UNUSED, Array
from data.importers.facts import Facts
from data.importers.formats.megatron_tars import Place, list_members, read_member
from data.importers.parsed_entries import Line, check_entries, from_log_probs, make_line, parse_ids, parse_mask
from data.importers.settings import Chunk, ImportSettings, source_files
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, printable
from kd_core.json_fields import check_object
from kd_core.memory import bounded_memory

SENTINEL = -999.0  # values below stand for entries that a nucleus left out
MOST_RATIO, MOST_MEMORY = 200, 16 << 30
HINT = (
    "Wanted an .npy of [samples, T + 1] token ids in the order of Megatron's samples: of each sample its tokens "
    "and, as the last, its last label."
)


def _array(path: str, flag: str) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{flag}={path}: {error!s:.200}. {HINT}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iufb":
        raise UsageError(f"{flag}={path}: {getattr(array, 'shape', '')} {getattr(array, 'dtype', '')}. {HINT}")
    return array


def _unpack(path: Path, payload: bytes) -> dict[str, Any]:
    """Returns the dict of a member."""
    with damage_as_usage_error(path, "a member of Megatron-LM's tars", "Copy it again"):
        try:
            size = zstandard.frame_content_size(payload)
            if not 0 < size <= MOST_RATIO * len(payload) + (1 << 20):
                raise ValueError(
                    f"{len(payload)} bytes declare {size} unpacked ones; wanted at most {MOST_RATIO} times"
                )
            with bounded_memory(MOST_MEMORY):
                unpacked = io.BytesIO(zstandard.ZstdDecompressor().decompress(payload, max_output_size=size))
                return check_object(torch.load(unpacked, map_location="cpu", weights_only=True), "a member")
        except UsageError:
            raise
        except pickle.UnpicklingError:  # torch's text tells how to load it in spite of that
            raise ValueError("it holds something else than a dict of tensors") from None
        except Exception as error:  # whatever torch raises of bytes that are no dict of tensors
            raise ValueError(f"{str(error).splitlines()[0] if str(error) else type(error).__name__:.200}") from None


def _tensor(value: Any, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or (shape and tuple(value.shape) != shape):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name}: {got}; wanted a tensor {shape or '[T, samples, K]'}")
    # A tensor may repeat a few stored numbers to any size.
    if value.numel() * value.element_size() > (stored := value.untyped_storage().nbytes()):
        raise ValueError(f"{name}: {tuple(value.shape)}, of {stored} stored bytes; wanted each number stored")
    return value


def _entries(values: Any, low: Any, bit: Any) -> tuple[Array, Array]:
    """Returns ids and log-probabilities [T, samples, K] of one tensor, with −inf for entries that are not used."""
    logs = _tensor(values, "values")
    if logs.ndim != 3 or not logs.is_floating_point():
        raise ValueError(f"values: {logs.dtype} {tuple(logs.shape)}; wanted floats [T, samples, K]")
    lower = _tensor(low, "indices_low", tuple(logs.shape)).numpy()
    if lower.dtype.kind not in "iu":
        raise ValueError(f"indices_low: {lower.dtype}; wanted integers")
    upper = _tensor(bit, "bit_17").numpy()
    if upper.shape != lower.shape:  # eight a byte
        if upper.dtype != np.uint8 or upper.shape != ((lower.size + 7) // 8,):
            raise ValueError(f"bit_17: {upper.dtype} {upper.shape}; wanted {(lower.size + 7) // 8} bytes, or bools")
        upper = np.unpackbits(upper, count=lower.size).reshape(lower.shape)
    ids = (upper.astype(np.int64) << 16) | lower.astype(np.int64)
    numbers = logs.float().numpy().astype(np.float64)
    if np.isnan(numbers).any():
        raise ValueError("values: an entry is not a number")
    return ids, np.where(numbers > SENTINEL, numbers, UNUSED)


def _join(parts: list[Array], filler: float) -> Array:
    """Concatenates micro-batches [T, samples, K]. A nucleus has its own K in each, and is padded to the widest."""
    widest = max(part.shape[2] for part in parts)
    wide = [np.pad(part, ((0, 0), (0, 0), (0, widest - part.shape[2])), constant_values=filler) for part in parts]
    return np.concatenate(wide, axis=1)


class Megatron:
    """Megatron-LM's tars. A part of the source is a member: the samples of one rank and iteration."""

    takes_values = False
    endings = (".tar",)

    def facts(self, job: ImportSettings) -> Facts | None:  # noqa: ARG002
        return None

    def files_beside(self, job: ImportSettings) -> list[Path]:  # noqa: ARG002
        return []

    def chunks(self, job: ImportSettings) -> Iterator[Chunk]:
        """Yields the members in the order of their samples.

        Raises:
            UsageError: ranks, samples or tokens are missing, samples stand twice, or tars are of two runs.
        """
        if not job.tokens:
            raise UsageError(f"--tokens: Megatron-LM's tars hold no tokens. {HINT}")
        _array(job.tokens, "--tokens")
        yield from list_members(job.source, source_files(job.source, self.endings))

    def lines(self, chunk: Chunk, job: ImportSettings) -> Iterator[Line]:
        """Yields a record for each sample of a member, or for each text of it.

        Raises:
            UsageError: the member is damaged, or does not fit the tokens.
        """
        where = f"{printable(chunk.path)}: {chunk.name}"
        try:
            for line in self._lines(_unpack(chunk.path, read_member(chunk.path, chunk.first, chunk.count)), chunk, job):
                yield line._replace(record=line.record.within(job.vocab_size))
        except UsageError:
            raise
        except KeyError as error:
            raise UsageError(f"{where}: no field {error}. Is it megatron?") from None
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            raise UsageError(f"{where}: {error!s:.400}.") from None

    def _lines(self, member: dict[str, Any], chunk: Chunk, job: ImportSettings) -> Iterator[Line]:
        place = Place(*chunk.numbers)
        names = ("values", "indices_low", "bit_17")
        if isinstance(member["values"], list) == bool(place.end):
            raise ValueError("values: of another format version than the member's name")
        if not place.end:
            # V1: a tensor a micro-batch. The iteration gives the first sample, since all are of one size.
            batches = list(zip(*(cast(list[Any], member[name]) for name in names), strict=True))
            parts = [_entries(*batch) for batch in batches]
            ids, logs = _join([part[0] for part in parts], 0), _join([part[1] for part in parts], UNUSED)
            micro_batch = parts[0][0].shape[1]
            first, samples, rest = place.start * ids.shape[1] * place.ranks, micro_batch * len(parts), 0
        else:
            ids, logs = _entries(*(member[name] for name in names))
            micro_batch, first = place.micro_batch, place.start
            samples, rest = divmod(place.end - place.start, place.ranks)
        if ids.shape[1] != samples or rest or samples % micro_batch:
            raise ValueError(
                f"values: {ids.shape[1]} samples in micro-batches of {micro_batch}; wanted {samples} of this rank"
            )
        texts = member.get("cu_seqlens_padded")
        edges = None if texts is None else _tensor(texts, "cu_seqlens_padded").numpy()
        for row in range(ids.shape[1]):
            batch, within = divmod(row, micro_batch)
            sample = first + (batch * place.ranks + place.rank) * micro_batch + within
            text_edges = None if edges is None else edges[row].tolist()
            yield from self._sample(sample, ids[:, row], logs[:, row], text_edges, job)

    def _sample(
        self, sample: int, ids: Array, logs: Array, edges: list[int] | None, job: ImportSettings
    ) -> Iterator[Line]:
        """Yields the records of a sample, [T, K]: one, or one for each of its texts."""
        T, all_tokens = len(ids), _array(job.tokens, "--tokens")
        if sample >= len(all_tokens) or all_tokens.shape[1] != T + 1:
            raise ValueError(f"sample {sample} of {T} positions; --tokens has {list(all_tokens.shape)}. {HINT}")
        tokens = parse_ids(np.asarray(all_tokens[sample]), "tokens", job.ids)
        mask = np.ones(T, np.uint8)
        if job.loss_mask:
            masks = _array(job.loss_mask, "--loss_mask")
            if masks.shape != (len(all_tokens), T):
                raise ValueError(f"--loss_mask has {list(masks.shape)}; wanted {[len(all_tokens), T]}")
            mask = parse_mask(masks[sample], T)
        width = int((logs > UNUSED).sum(axis=1).max(initial=0))
        if (logs[:, width:] > UNUSED).any():  # entries that are not used lie behind the others
            width = logs.shape[1]
        entries = from_log_probs(*check_entries(ids[:, :width], logs[:, :width], job.ids))
        bounds = [0, T] if edges is None else [edge for edge in edges if 0 <= edge <= T]
        for start, end in itertools.pairwise(bounds):
            # The last position of a text describes the first token of the next one, which it does not know.
            last = end if end == T else end - 1
            if last > start:
                part = slice(start, last)
                name = f"sample-{sample:08d}" + ("" if edges is None else f"/{start}")
                yield make_line(name, tokens[start : last + 1], mask[part], entries.at(part), start=0)
