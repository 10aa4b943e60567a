"""Sizes and fingerprints of corpora, without reading them as a whole."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from data.corpus import corpus_sizes
from data.corpus.corpus_sizes import corpus_fingerprint, estimate_bytes

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("ending", ["", *PACK])
def test_a_file_is_estimated_as_it_is_unpacked(tmp_path: Path, ending: str) -> None:
    text = b"".join(b'{"text": "line %d of many that differ a little"}\n' % i for i in range(40_000))
    (tmp_path / f"a.jsonl{ending}").write_bytes(PACK[ending](text) if ending else text)
    assert estimate_bytes([tmp_path / f"a.jsonl{ending}"]) == pytest.approx(len(text), rel=0.3)


def test_a_table_is_estimated_by_its_metadata(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": [f"{i} fox " * 40 for i in range(3_000)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < table.nbytes / 3
    assert estimate_bytes([tmp_path / "a.parquet"]) == pytest.approx(table.nbytes, rel=0.2)


def test_a_large_corpus_is_fingerprinted_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(1_000))
    whole = corpus_fingerprint([path])
    assert len(whole) == 64
    monkeypatch.setattr(corpus_sizes, "MOST_HASHED", 999)
    monkeypatch.setattr(corpus_sizes, "SAMPLED_BYTES", 100)
    sampled = corpus_fingerprint([path])
    assert sampled.startswith("sampled ")
    for place in (0, 99, 550, 999):
        path.write_bytes(bytes(place) + b"x" + bytes(999 - place))
        assert corpus_fingerprint([path]) != sampled
    path.write_bytes(bytes(1_001))
    assert corpus_fingerprint([path]) != sampled
    path.write_bytes(bytes(1_000))
    assert corpus_fingerprint([path]) == sampled
    path.rename(tmp_path / "b.txt")
    assert corpus_fingerprint([tmp_path / "b.txt"]) != sampled
