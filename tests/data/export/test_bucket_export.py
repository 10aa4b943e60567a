"""Exports into a bucket of a real S3 server: the bytes of one into a folder, also after kills and by two at once."""

import multiprocessing
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache.inspection.verify import verify
from data.cache.manifest import read_manifest
from data.corpus.corpus import Corpus
from data.export import export as steps
from data.export.plan import TeacherExport, make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_plan
from data.storage.storage import LocalStorage, storage_at
from data.stream.source import Shards
from kd_core.errors import UsageError
from tests.data.cache.earlier import make_earlier
from tests.forks import start_server
from tests.s3 import free_port, localbucket, use_server
from tests.tiny import Tiny, bytes_of, make_corpus, write_caches

KILLS = 3


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A bucket of a server that runs, as a folder."""
    (folder := tmp_path / "buckets" / "bucket").mkdir(parents=True)
    with localbucket(folder.parent, port := free_port()):
        use_server(monkeypatch, port)
        yield folder


def test_a_bucket_gets_the_bytes_of_a_folder(tiny: Tiny, tmp_path: Path, bucket: Path) -> None:
    write_caches(tiny.export(), "s3://bucket/caches", ranks=2)
    assert bytes_of(bucket / "caches") == bytes_of(tiny.root / "cache")
    # What is read from it is what is read from the folder, and what is lost is made again.
    shards = Shards("s3://bucket/caches/train", block_cache=None)
    shards.check(shards.manifest.vocab_size, shards.manifest.tokenizer)
    with shards.reader() as reader:
        remote = [record.token_ids.tolist() for record in reader.records()]
    assert remote == [record.token_ids.tolist() for record in tiny.records()]
    assert verify("s3://bucket/caches/train", lambda _: None).problems == []
    storage_at("s3://bucket/caches/train").delete("shard-000001.tar")
    storage_at("s3://bucket/caches/train").delete("shard-000002.index")
    write_caches(tiny.export(), "s3://bucket/caches")
    assert bytes_of(bucket / "caches") == bytes_of(tiny.root / "cache")
    with pytest.raises(UsageError, match="s3://bucket/caches/train: holds an export with another row_length"):
        write_caches(tiny.export(row_length=16), "s3://bucket/caches")
    # Growth, as in a folder.
    make_corpus(tmp_path / "corpus", documents=40)
    more = tiny.export(corpus=Corpus(str(tmp_path / "corpus")))
    write_caches(tiny.export(), tmp_path / "local")
    for out in ("s3://bucket/caches", tmp_path / "local"):
        write_caches(more, out, extend=True)
    assert bytes_of(bucket / "caches") == bytes_of(tmp_path / "local")
    assert len(read_manifest("s3://bucket/caches/train").plans) == 2


def _write(export: TeacherExport, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    write_caches(export, "s3://bucket/caches")


def test_kills_at_random_moments_and_two_exports_at_once_change_no_byte(tiny: Tiny, bucket: Path) -> None:
    context, random = multiprocessing.get_context(start_server()), np.random.default_rng(5)
    # The server of forks may be older than this test's environment.
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "no_proxy"))}
    write = {"target": _write, "args": (tiny.export(), environment)}
    killed, longest = 0, 1.5
    while killed < KILLS:
        process = context.Process(**write)
        process.start()
        process.join(random.uniform(0.05, longest))
        if process.exitcode is None:
            killed += 1
        else:
            # It was done. Start anew, with a shorter time to live on a fast machine.
            assert process.exitcode == 0
            longest = max(0.1, longest / 2)
            shutil.rmtree(bucket / "caches")
        process.kill()
        process.join()
    both = [context.Process(**write) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert bytes_of(bucket / "caches") == bytes_of(tiny.root / "cache")


def test_a_resumed_export_trusts_indexes_and_reads_no_shard(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_caches(tiny.export(), tmp_path)
    (tmp_path / "train" / "manifest.json").unlink()
    reads: list[str] = []
    plain = LocalStorage.read

    def counted(self: LocalStorage, name: str, most: int) -> bytes:
        reads.append(name)
        return plain(self, name, most)

    monkeypatch.setattr(LocalStorage, "read", counted)
    write_caches(tiny.export(), tmp_path)
    assert bytes_of(tmp_path) == bytes_of(tiny.root / "cache")
    assert not [name for name in reads if name.startswith("shard") and name.endswith(".tar")]
    # Of a shard without a valid index, or of another size than it states, the bytes are read again.
    index = tmp_path / "train" / "shard-000000.index"
    index.write_bytes(index.read_bytes()[:-1])
    (tmp_path / "train" / "manifest.json").unlink()
    reads.clear()
    write_caches(tiny.export(), tmp_path)
    assert [name for name in reads if name.endswith(".tar") and name.startswith("shard")] == ["shard-000000.tar"]
    assert bytes_of(tmp_path) == bytes_of(tiny.root / "cache")
    shard = tmp_path / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    (tmp_path / "train" / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"shard-000001.tar: damaged: block \d: .* Delete the shard"):
        write_caches(tiny.export(), tmp_path)


def test_each_rank_verifies_what_it_wrote_and_the_manifest_waits_for_all(tiny: Tiny, tmp_path: Path) -> None:
    plan = make_plans(tiny.export(), tmp_path)[0]
    record_or_check_plan(plan)
    model = steps.load_teacher(tiny.export(), torch.device("cpu"))
    steps.write_missing_shards(plan, model, steps.make_tables(plan, model), rank=0, ranks=2)
    names = {path.name for path in plan.folder.iterdir()}
    assert {"shard-000000.tar", "shard-000000.index", "shard-000002.index"} <= names
    assert not names & {"shard-000001.tar", "shard-000001.index"}
    with pytest.raises(UsageError, match="shard-000001.tar: the shard or its index is gone"):
        write_manifest(plan)


@pytest.mark.parametrize("grows", [False, True])
def test_an_export_of_an_earlier_version_gets_its_indexes(tiny: Tiny, tmp_path: Path, grows: bool) -> None:
    """Interrupted before its manifest was there, or extended now."""
    make_corpus(tmp_path / "corpus", documents=40)
    more = tiny.export(corpus=Corpus(str(tmp_path / "corpus")))
    write_caches(tiny.export(), tmp_path / "now")
    write_caches(tiny.export(), tmp_path / "earlier")
    for split in ("train", "validation"):
        make_earlier(tmp_path / "earlier" / split, 3)
        if not grows:
            (tmp_path / "earlier" / split / "manifest.json").unlink()
    for name in ("now", "earlier"):
        write_caches(more if grows else tiny.export(), tmp_path / name, ranks=2, extend=grows)
    assert bytes_of(tmp_path / "earlier") == bytes_of(tmp_path / "now")
