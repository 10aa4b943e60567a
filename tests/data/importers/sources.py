"""Other systems' files, made for tests from a teacher's log-probabilities, by their documentation and sources."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

EXACT = 3


def distillkit_config(vocab_size: int, k: int) -> dict[str, Any]:
    """A configuration of today's codec: some exact values, and a curve of three terms."""
    return {
        "d": vocab_size, "k": k, "exact_k": EXACT, "exact_dtype": "float32", "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32", "residual_bins": [], "delta_encoding": False,
    }  # fmt: skip


def distillkit_terms(n: int) -> np.ndarray:
    """The curve's terms at each place: 1, t and √t."""
    at = np.arange(n, dtype=np.float64)
    return np.stack([np.ones(n), at, np.sqrt(at)], axis=1)


def distillkit_bytes(ids: np.ndarray, logs: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`bytepacked_indices` and `compressed_logprobs` of falling log-probabilities [T, k], with `distillkit_config`."""
    bits = int(np.ceil(np.log2(vocab_size)))
    flat = (ids[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(flat.reshape(len(ids), -1).astype(np.uint8), axis=1)
    X = distillkit_terms(ids.shape[1] - EXACT)
    curve = np.linalg.lstsq(X, logs[:, EXACT:].T.astype(np.float64), rcond=None)[0].T
    values = np.concatenate([logs[:, :EXACT], curve], axis=1).astype("<f4")
    return packed, values.view(np.uint8)


def _tar(path: Path, meta: dict[str, Any], members: dict[str, dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        payloads = {"_meta.json": json.dumps(meta, separators=(",", ":")).encode()}
        for name, value in members.items():
            buffer = io.BytesIO()
            torch.save(value, buffer)
            payloads[name] = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
        for name, payload in payloads.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def megatron_tars(
    folder: Path, ids: np.ndarray, logs: np.ndarray, *, version: int, dtype: torch.dtype = torch.float16,
    edges: list[list[int]] | None = None, batches: tuple[int, int, int] = (2, 2, 2),
) -> None:  # fmt: skip
    """What `LogitsSaverHooks` of Megatron-LM leaves of samples [samples, T, K], by its source.

    `batches` are the ranks, the samples of a micro-batch, and the micro-batches of an iteration. Entries of −inf get
    its sentinels: −1000 (V1: −10000) and the index −1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks, micro, count = batches
    per_iteration = ranks * micro * count
    sentinel = -1e3 if version == 2 else -1e4
    logs, ids = np.where(np.isfinite(logs), logs, sentinel), np.where(np.isfinite(logs), ids, -1)
    saver = {"k": ids.shape[2], "p": None, "min_k": 1, "save_dtype": "fp16"}
    if version == 2:
        saver |= {"format_version": 2, "mbs_save": micro, "dp_size_save": ranks, "gbs_save": per_iteration}
    for rank in range(ranks):
        members = {}
        for iteration in range(len(ids) // per_iteration):
            first = iteration * per_iteration
            # Rank d of D has micro-batches d, d + D, …: [micro-batches, micro]
            own = first + (np.arange(count)[:, None] * ranks + rank) * micro + np.arange(micro)
            values = torch.from_numpy(logs[own]).permute(0, 2, 1, 3).to(dtype)  # [micro-batches, T, micro, K]
            index = torch.from_numpy(ids[own]).permute(0, 2, 1, 3)
            if version == 1:
                members[f"{iteration}.pt.zst"] = {
                    "values": list(values), "indices_low": [(x & 0xFFFF).to(torch.uint16) for x in index],
                    "bit_17": [(x >> 16).to(torch.bool) for x in index],
                }  # fmt: skip
            else:
                joined = torch.cat(list(index), dim=1)
                high = ((joined >> 16) & 1).to(torch.uint8)
                members[f"{first}-{first + per_iteration}.pt.zst"] = {
                    "values": torch.cat(list(values), dim=1), "indices_low": (joined & 0xFFFF).to(torch.uint16),
                    "bit_17": torch.from_numpy(np.packbits(high.reshape(-1).numpy())), "format_version": 2,
                    "cu_seqlens_padded": None if edges is None else torch.tensor([edges[i] for i in own.reshape(-1)]),
                }  # fmt: skip
        last = len(ids) // per_iteration - 1
        name = f"cp0_dp{rank}__{last}.tar" if version == 1 else f"dp{rank}__0-{len(ids)}.tar"
        _tar(folder / name, {"hash": "x", "identifiers": {}, "saver": saver}, members)
