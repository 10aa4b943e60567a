"""A conversion that was interrupted goes on, and its bytes depend neither on that nor on the number of processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache.inspection.verify import verify
from data.cache.selection import Selection
from data.importers import import_cache as module
from data.importers.facts import Facts
from data.importers.import_cache import PLAN_FILE, import_cache
from data.importers.import_journal import JOURNAL_FILE
from data.importers.settings import UNKNOWN, ImportSettings
from data.storage.storage import Storage
from kd_core.errors import UsageError
from tests.patience import patience
from tests.tiny import bytes_of

V, K, ROWS = 40, 4, 60


def _source(folder: Path) -> Path:
    """Two files of rows of several lengths, with blank lines between them."""
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part in range(2):
        lines = []
        for _ in range(ROWS // 2):
            T = int(random.integers(3, 40))
            logs = -np.sort(random.exponential(2.0, (T, K)), axis=1) - 1.5
            ids = np.argsort(random.random((T, V)), axis=1)[:, :K]
            row = {
                "tokens": random.integers(0, V, T + 1).tolist(),
                "top_ids": ids.tolist(),
                "top_log_probs": logs.tolist(),
            }
            lines.append(json.dumps(row) + "\n" * (1 + int(random.integers(2))))
        (folder / f"part_{part}.jsonl").write_text("".join(lines))
    return folder


def _job(source: Path, **settings: Any) -> ImportSettings:
    small = {"block_positions": 64, "shard_bytes": 6000, "chunk_bytes": 8000, **settings}
    return ImportSettings("jsonl", str(source), V, UNKNOWN, **small)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source, and the bytes of its cache as one process writes them in one go."""
    root = tmp_path_factory.mktemp("whole")
    source = _source(root / "source")
    manifest = import_cache(_job(source), root / "cache")
    assert len(manifest.shards) > 6
    assert manifest.records == ROWS
    assert not verify(root / "cache", lambda _: None).problems
    found = bytes_of(root / "cache")
    assert set(found) == {"manifest.json", "tables.tar", *(name for shard in manifest.shards for name in shard.files)}
    return source, found


@pytest.mark.parametrize("journal", ["whole", "cut", "gone", "no shard"])
def test_an_interrupted_conversion_goes_on(
    tmp_path: Path, whole: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    source, wanted = whole
    written, write = [0], module.write_shard

    def interrupted(storage: Storage, name: str, blocks: list[bytes]) -> None:
        if written[0] % 3 == 2:
            written[0] += 1
            raise KeyboardInterrupt
        write(storage, name, blocks)
        written[0] += 1

    monkeypatch.setattr(module, "write_shard", interrupted)
    for _ in range(20):
        try:
            import_cache(_job(source), tmp_path / "cache")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "cache" / "manifest.json").exists()
            path = tmp_path / "cache" / JOURNAL_FILE
            lines = path.read_bytes()
            if journal == "cut" and written[0] < 10:  # as where the machine stopped in the middle of a line
                path.write_bytes(lines[:-10])
            elif journal == "gone" and written[0] < 10:
                path.unlink()
            elif journal == "no shard" and written[0] < 10:
                max((tmp_path / "cache").glob("shard-*.tar")).unlink()
    assert bytes_of(tmp_path / "cache") == wanted
    # Where nothing was lost, no shard was written twice.
    shards = [name for name in wanted if name.startswith("shard") and name.endswith(".tar")]
    assert journal != "whole" or written[0] - written[0] // 3 == len(shards)
    with pytest.raises(UsageError, match="exists already"):
        import_cache(_job(source), tmp_path / "cache")


def test_another_source_or_setting_is_not_mixed_in(
    tmp_path: Path, whole: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    source = _source(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_cache(_job(source), tmp_path / "cache")
    with pytest.raises(UsageError, match=r"other settings or files \(shard_bytes\)"):
        import_cache(_job(source, shard_bytes=7000), tmp_path / "cache")
    times = (source / "part_0.jsonl").stat()
    os.utime(source / "part_0.jsonl", (1, 1))
    with pytest.raises(UsageError, match=r"other settings or files \(the source's files\)"):
        import_cache(_job(source), tmp_path / "cache")
    tables = tmp_path / "cache" / "tables.tar"
    assert tables.read_bytes() == whole[1]["tables.tar"]
    # Damaged tables are one message, also where processes would read them.
    tables.write_bytes(tables.read_bytes()[:700])
    os.utime(source / "part_0.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UsageError, match=r"tables\.tar: damaged"):
        import_cache(_job(source), tmp_path / "cache", processes=2)


@pytest.mark.parametrize(("kind", "name"), [("huggingface", "cache.json"), ("distillkit", "compression_config.yaml")])
def test_files_beside_the_rows_are_not_exchanged(tmp_path: Path, kind: str, name: str) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    cache.mkdir()
    (source / "rows.parquet").touch()
    (source / name).write_text(json.dumps(Facts(V, UNKNOWN, {}, Selection(K), ()).as_json()))
    job = ImportSettings(kind, str(source), V, UNKNOWN)
    module._Conversion(job, cache).claim()  # pyright: ignore[reportPrivateUsage]
    module._Conversion(job, cache).claim()  # pyright: ignore[reportPrivateUsage]
    os.utime(source / name, (1, 1))
    with pytest.raises(UsageError, match=r"other settings or files \(the source's files\)"):
        module._Conversion(job, cache).claim()  # pyright: ignore[reportPrivateUsage]


SCRIPT = """
import sys
from pathlib import Path
from data.importers.import_cache import PLAN_FILE, import_cache
from data.importers.settings import ImportSettings
if __name__ == "__main__":
    small = {"block_positions": 64, "shard_bytes": 6000, "chunk_bytes": 8000}
    import_cache(ImportSettings("jsonl", sys.argv[1], 40, "unknown", **small), Path(sys.argv[2]), processes=2)
"""


def test_killed_processes_leave_none_behind_and_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, dict[str, bytes]]
) -> None:
    """Two processes side by side are killed in the middle, and one goes on."""
    source, out = whole[0], tmp_path / "cache"
    (tmp_path / "convert.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "convert.py"), str(source), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + patience(60)
    while not (out / "shard-000003.tar").exists() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    running.kill()
    running.wait()
    while _group(running.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _group(running.pid)
    written = {path.name: path.read_bytes() for path in out.glob("shard-*.tar")}
    assert len(written) > 3
    assert written.items() <= whole[1].items()
    if (out / PLAN_FILE).exists():
        import_cache(_job(source), out)
    assert bytes_of(out) == whole[1]


def _group(leader: int) -> bool:
    """Checks whether a process of a killed command's group is there."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True
