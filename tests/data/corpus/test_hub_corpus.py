"""A data set of the hub, from one on the loopback: its files, a part of them, a revision, and without it."""

import hashlib
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.corpus import corpus_files
from data.corpus.corpus import Corpus
from kd_core.errors import UsageError

COMMIT = {"main": "a" * 40, "v1": "b" * 40}
huggingface_hub = pytest.importorskip("huggingface_hub")


class _Hub(BaseHTTPRequestHandler):
    """Those answers of the hub's API that fetching a data set asks for."""

    files: dict[str, bytes]

    def _answer(self, status: int, payload: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(payload)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = "/api/datasets/owner/set"
        if path.startswith(f"{api}/revision/"):
            revision = path.rpartition("/revision/")[2]
            if revision not in COMMIT:
                self._answer(404, X_Error_Code="RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in self.files]
            self._answer(200, json.dumps({"id": "owner/set", "sha": COMMIT[revision], "siblings": siblings}).encode())
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(payload), "oid": hashlib.sha1(payload).hexdigest()}  # noqa: S324
                for name, payload in self.files.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        elif path.startswith("/datasets/owner/set/resolve/"):
            commit, _, name = path.removeprefix("/datasets/owner/set/resolve/").partition("/")
            payload = self.files[name] + (b'{"text": "of v1"}\n' if commit == COMMIT["v1"] else b"")
            self._answer(200, payload, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(payload).hexdigest()}"')  # noqa: S324
        else:
            self._answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 (as http.server has it)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[ThreadingHTTPServer]:
    parquet.write_table(pa.table({"text": ["in a table"]}), tmp_path / "x.parquet")
    files = {
        "README.md": b"---\nlicense: mit\n---\nTells of the set.",
        ".gitattributes": b"*.parquet filter=lfs",
        "dataset_infos.json": b"{}",
        "data/train.jsonl": b'{"text": "of the hub"}\n',
        "data/test-0.parquet": (tmp_path / "x.parquet").read_bytes(),
        "code/load.py": b"raise SystemExit",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _texts(corpus: str) -> dict[str, object]:
    corpus_files._snapshot.cache_clear()
    return {document.name: document.content for document in Corpus(corpus).documents()}


@pytest.mark.usefixtures("hub")
def test_a_data_set_of_the_hub_and_parts_of_it() -> None:
    train, test = {"data/train.jsonl:1": "of the hub"}, {"data/test-0.parquet:1": "in a table"}
    assert _texts("hub:owner/set:data/train*") == train
    assert _texts("hub:owner/set") == {**test, **train}
    assert _texts("hub:owner/set:data") == {**test, **train}
    assert _texts("hub:owner/set:data/test-0.parquet") == test
    assert _texts("hub:owner/set@v1:data/train.jsonl") == {**train, "data/train.jsonl:2": "of v1"}
    assert Corpus("hub:owner/set:data/train*").identity() != Corpus("hub:owner/set").identity()
    with pytest.raises(UsageError, match=r"corpus hub:owner/set:code: .*has no .txt"):
        _texts("hub:owner/set:code")
    for wrong in ("hub:owner/other", "hub:owner/set@v9"):
        with pytest.raises(UsageError, match=rf"corpus {wrong}: cannot be downloaded from the hub"):
            _texts(wrong)
    with pytest.raises(UsageError, match="wanted hub:OWNER/NAME"):
        _texts("hub:owner/set/data/train")


@pytest.mark.usefixtures("hub")
def test_without_the_hub_what_was_fetched_before_is_taken_if_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    part = _texts("hub:owner/set:data/train*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert _texts("hub:owner/set:data/train*") == part
    with pytest.raises(UsageError, match="corpus hub:owner/set: cannot be downloaded from the hub"):
        _texts("hub:owner/set")
