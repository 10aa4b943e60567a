"""DistillKit's codecs of log-probabilities, decoded as its own code decodes them, to the bit.

Of the k entries of a position, the likeliest `exact_k` are stored as floats. The others are values of a curve, a sum of
`polynomial_terms` over their places, and may have quantised residuals. Its two codecs are:

    today's (`DistributionQuantizationConfig`)   a string of bytes a position: exact values, coefficients, then for each
                                                 residual bin a scale and its elements of `element_bits` bits
                                                 ids of ⌈log2 d⌉ bits, end to end, highest bit first
    the legacy one (`LegacyLogitCompressionConfig`)   three lists a position: exact values, coefficients, and 64-bit
                                                 words with ⌊64 / bits⌋ ids each, lowest bits first

With `delta_encoding` the values are differences to the entry before.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from data.cache.codec.rank_tables import MAX_VOCABULARY
from data.cache.record import Array
from kd_core.errors import UsageError
from kd_core.files import printable, read_text
from kd_core.json_fields import check_integer, check_list, check_object, check_text, short_repr

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
MOST_K, MOST_BITS, MOST_DEGREE = 1 << 14, 32, 32
MOST_CONFIG_BYTES = 1 << 16


@dataclass(frozen=True)
class Bin:
    """A run of residuals with one scale. Each takes `element_bits` bits."""

    scale_dtype: torch.dtype
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class CurveCodec:
    """Settings of today's codec, under its own names. `d` is the number of ids, `k` of entries."""

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype = torch.float32
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: torch.dtype = torch.float32
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False  # of the writer alone
    normalize_t: bool = False

    @property
    def position_bytes(self) -> int:
        """Returns the bytes of a position's values."""
        bins = sum(b.scale_dtype.itemsize + (b.element_bits * b.num_elements + 7) // 8 for b in self.residual_bins)
        return self.exact_k * self.exact_dtype.itemsize + len(self.polynomial_terms) * self.term_dtype.itemsize + bins

    def _terms(self) -> torch.Tensor:
        """Returns each term of the curve at each place: [k − exact_k, terms]."""
        n = self.k - self.exact_k
        # Places 0, 1, …, or 0 to 1, in the terms' own precision.
        places = (
            torch.linspace(0, 1, n, dtype=self.term_dtype) if self.normalize_t else torch.arange(n).to(self.term_dtype)
        )
        specials = {"sqrt": torch.sqrt, "exp": torch.exp}
        terms = [specials[term](places) if isinstance(term, str) else places**term for term in self.polynomial_terms]
        return torch.stack(terms, dim=-1)

    def decode(self, payload: Array) -> Array:
        """Decodes the values [T, k] of positions from their bytes [T, n], as float32.

        Raises:
            ValueError: the positions have another number of bytes.
        """
        if payload.ndim != 2 or payload.shape[1] != self.position_bytes:
            raise ValueError(
                f"compressed_logprobs: {list(payload.shape)} bytes; by its configuration a position has "
                f"{self.position_bytes}. Is --compression that of the capture?"
            )
        data, offset = torch.from_numpy(payload.astype(np.uint8)), 0

        def take(count: int, dtype: torch.dtype) -> torch.Tensor:
            nonlocal offset
            part = data[:, offset : offset + count * dtype.itemsize].contiguous()
            offset += count * dtype.itemsize
            return part.view(dtype) if count else torch.empty((len(data), 0), dtype=dtype)

        exact = take(self.exact_k, self.exact_dtype)
        coefficients = take(len(self.polynomial_terms), self.term_dtype)
        # Residuals of the bins, end to end; the entries behind the last bin have none.  [T, k − exact_k]
        parts = list[torch.Tensor]()
        for residual_bin in self.residual_bins:
            scale = take(1, residual_bin.scale_dtype)
            packed = take((residual_bin.element_bits * residual_bin.num_elements + 7) // 8, torch.uint8)
            parts.append(_dequantise(packed, scale, residual_bin))
        missing = self.k - self.exact_k - sum(part.shape[1] for part in parts)
        rest = torch.cat([*parts, torch.zeros((len(data), missing))], dim=-1).to(self.exact_dtype)
        if self.polynomial_terms:
            # value = Σ coefficient · term + residual, summed in the terms' precision.
            rest = torch.sum(self._terms() * coefficients.unsqueeze(-2), dim=-1) + rest
        values = torch.cat([exact, rest], dim=-1)
        if self.delta_encoding:
            values = torch.cumsum(values.float(), dim=-1).to(self.exact_dtype)
        return values.float().numpy()

    def ids(self, payload: Array) -> Array:
        """Decodes the ids [T, k] of positions from their bytes [T, n]."""
        return unpack_bits(payload, index_bits(self.d), self.k)


@dataclass(frozen=True)
class LegacyCodec:
    """Settings of the legacy codec, under its own names."""

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: torch.dtype = torch.float32

    def decode(self, exact: Array, coefficients: Array) -> Array:
        """Decodes the values [T, k] of positions from exact ones [T, exact_k] and coefficients [T, terms]."""
        terms = self.polynomial_degree + 1 + self.with_sqrt_term if self.exact_k < self.k else 0
        if exact.shape[1:] != (self.exact_k,) or coefficients.shape[1:] != (terms,):
            raise ValueError(
                f"exact_values and coeffs: {list(exact.shape)} and {list(coefficients.shape)}; by the configuration a "
                f"position has {self.exact_k} and {terms}. Is --compression that of the capture?"
            )
        values = torch.from_numpy(exact.astype(np.float32))
        if terms:
            # Places count from 1. Exponents are 0, −1, −2, …, or 0, 1, 2, … where the polynomial is not inverted.
            places = torch.arange(self.k - self.exact_k, dtype=torch.float32) + 1
            sign = -1 if self.invert_polynomial else 1
            curve = [places ** (sign * i) for i in range(self.polynomial_degree + 1)]
            X = torch.stack([*curve, places.sqrt()] if self.with_sqrt_term else curve, dim=-1)
            factors = torch.from_numpy(coefficients.astype(np.float32))
            values = torch.cat([values, torch.sum(X * factors.unsqueeze(-2), dim=-1)], dim=-1)
        return values.numpy()

    def ids(self, words: Array) -> Array:
        """Decodes the ids [T, k] of positions from their 64-bit words [T, n]."""
        bits = index_bits(self.vocab_size)
        ids_a_word = 64 // bits
        if words.ndim != 2 or words.shape[1] != -(-self.k // ids_a_word):
            raise ValueError(
                f"packed_indices: {list(words.shape)} words; {self.k} ids of {bits} bits, {ids_a_word} a word, wanted"
            )
        shifts = np.arange(ids_a_word, dtype=np.uint64) * np.uint64(bits)
        ids = (words.astype(np.uint64)[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
        return ids.reshape(len(words), -1)[:, : self.k].astype(np.int64)


def index_bits(ids: int) -> int:
    """Returns the bits of an id, by the float32 arithmetic of DistillKit."""
    return int(np.ceil(np.log2(np.float32(ids))))


def unpack_bits(payload: Array, bits: int, count: int) -> Array:
    """Returns `count` integers of `bits` bits each, highest first, from the bytes of each row: [T, n] → [T, count]."""
    if payload.ndim != 2 or payload.shape[1] != (bits * count + 7) // 8:
        raise ValueError(f"has {list(payload.shape)} bytes for {count} numbers of {bits} bits a position")
    flat = np.unpackbits(payload.astype(np.uint8), axis=1, count=bits * count).reshape(len(payload), count, bits)
    # Put zeros before each number up to 32 bits, and read it as a big-endian word.
    words = np.packbits(np.pad(flat, ((0, 0), (0, 0), (32 - bits, 0))), axis=2)
    return words.view(">u4")[:, :, 0].astype(np.int64)


def _dequantise(packed: torch.Tensor, scale: torch.Tensor, residual_bin: Bin) -> torch.Tensor:
    """Returns residuals [T, num_elements]: (element − half the range) · scale, and ±scale for single bits."""
    elements = torch.from_numpy(unpack_bits(packed.numpy(), residual_bin.element_bits, residual_bin.num_elements))
    if residual_bin.element_bits == 1:
        return (elements.to(torch.float32) * 2.0 - 1.0) * scale
    return (elements - 2 ** (residual_bin.element_bits - 1)).to(torch.float32) * scale


def _dtype(value: Any, name: str) -> torch.dtype:
    if check_text(value, name) not in DTYPES:
        raise ValueError(f"{name}: {value!r}; wanted one of {', '.join(DTYPES)}")
    return DTYPES[value]


def _bin(value: Any) -> Bin:
    item = check_object(value, "a residual bin", ("element_bits", "num_elements", "scale_dtype"))
    return Bin(
        _dtype(item["scale_dtype"], "scale_dtype"),
        check_integer(item["element_bits"], "element_bits", 1, MOST_BITS),
        check_integer(item["num_elements"], "num_elements", 1, MOST_K),
    )


def _term(value: Any) -> int | str:
    return value if value in ("sqrt", "exp") else check_integer(value, "polynomial_terms", -MOST_DEGREE, MOST_DEGREE)


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {short_repr(value)}; wanted true or false")
    return value


def _number(least: int, most: int) -> Callable[[Any, str], int]:
    return lambda value, name: check_integer(value, name, least, most)


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "d": _number(2, MAX_VOCABULARY),
    "vocab_size": _number(2, MAX_VOCABULARY),
    "k": _number(1, MOST_K),
    "exact_k": _number(0, MOST_K),
    "polynomial_degree": _number(0, MOST_DEGREE),
    "exact_dtype": _dtype,
    "term_dtype": _dtype,
    "polynomial_terms": lambda value, name: tuple(map(_term, check_list([] if value is None else value, name))),
    "residual_bins": lambda value, name: tuple(map(_bin, check_list(value, name))),
}


def _parse(value: dict[str, Any], kind: type[CurveCodec] | type[LegacyCodec]) -> dict[str, Any]:
    """Returns the checked fields of a configuration."""
    names = {field.name for field in fields(kind)}
    if unknown := set(value) - names:
        raise ValueError(f"{min(unknown)}: no such field. Wanted {', '.join(sorted(names))}")
    return {name: CHECKS.get(name, _switch)(setting, name) for name, setting in value.items()}


def parse_codec(value: Any) -> CurveCodec | LegacyCodec:
    """Builds a codec from its configuration, or from a configuration of DistillKit's training that names it.

    Raises:
        ValueError: a field is missing, unknown or out of bounds.
    """
    config = check_object(value, "it")
    config = check_object(config.get("teacher", config), "teacher")
    legacy = config.get("legacy_logit_compression", config if "polynomial_degree" in config else None)
    try:
        if legacy is not None:
            codec = LegacyCodec(**_parse(check_object(legacy, "legacy_logit_compression"), LegacyCodec))
            fits = codec.k >= codec.exact_k
        else:
            todays = check_object(config.get("logprob_compressor", config), "logprob_compressor")
            codec = CurveCodec(**_parse(todays, CurveCodec))
            rest = codec.k - codec.exact_k
            fits = sum(item.num_elements for item in codec.residual_bins) <= rest
            fits = fits and (rest == 0 or bool(codec.polynomial_terms or codec.residual_bins))
    except TypeError as error:
        raise ValueError(f"{str(error).partition(') ')[2]}") from None
    if not fits:
        raise ValueError("k, exact_k, terms and bins do not fit each other")
    return codec


def read_codec(path: Path) -> CurveCodec | LegacyCodec:
    """Reads DistillKit's configuration of its codec, in YAML or JSON.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        import yaml  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"{printable(path)}: YAML needs the extra: pip install 'kd-workspace[parquet]'.") from None
    text = read_text(path, "DistillKit's configuration of its codec", MOST_CONFIG_BYTES)
    try:
        return parse_codec(cast(Any, yaml).safe_load(text))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(
            f"{printable(path)}: {error!s:.400}. Wanted DistillKit's compression_config.yaml, or a configuration of "
            "its training."
        ) from None
