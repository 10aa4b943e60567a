"""Hub ids: fetched once a machine, named with their commit, and one message where the hub does not give them.

The hub is a server of this process that answers as the real one does, or a cache that is there already.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kd_core.errors import UsageError
from kd_core.hub import local_folder, pin_commit, resolve_folder, snapshot_of_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(100_000),
    "tokenizer.model": b"pieces",
    "consolidated.safetensors": b"again",
    "pytorch_model.bin": b"pickled",
    "onnx/model.safetensors": b"other",
    "original/USE_POLICY.md": b"again",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "USE_POLICY.md": b"terms",
}
TOOLS = "additional_chat_templates/tool_use.jinja"
WANTED = {"config.json", "model.safetensors", "tokenizer.model", TOOLS, "USE_POLICY.md"}


class _Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks: a revision's commit, its files, and each file."""

    fetched: Counter[str]

    def _answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not path.removeprefix("/api/models").startswith("/owner/name"):
            self._answer(b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, 404)
        elif path == "/api/models/owner/name/revision/main":
            about: dict[str, Any] = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
            self._answer(json.dumps(about).encode(), {})
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            sizes = [
                {"type": "file", "path": f, "size": len(b), "oid": f"oid{i}"} for i, (f, b) in enumerate(FILES.items())
            ]
            self._answer(json.dumps(sizes).encode(), {})
        else:
            name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
            if self.command == "GET":
                self.fetched[name] += 1
            self._answer(FILES[name], {"X-Repo-Commit": COMMIT, "ETag": f'"oid{list(FILES).index(name)}"'})

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def hub() -> Iterator[tuple[str, Counter[str]]]:
    """The server's address, and how often each file was fetched."""
    _Hub.fetched = Counter()
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}", _Hub.fetched
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import sys
from kd_core.errors import UsageError
from kd_core.hub import resolve_folder, pin_commit
try:
    print(resolve_folder(sys.argv[1], "student.folder"), pin_commit(sys.argv[1]))
except UsageError as error:
    print(error)
"""


def _start(home: Path, name: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that resolves a name: the client reads its environment once, when it is imported."""
    settings = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, name], env=settings, stdout=subprocess.PIPE, text=True)


def _said(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=90)[0].strip()


def test_one_process_of_a_machine_fetches_what_all_read(tmp_path: Path, hub: tuple[str, Counter[str]]) -> None:
    url, fetched = hub
    ranks = [_start(tmp_path, "hub:owner/name", HF_ENDPOINT=url) for _ in range(3)]
    (said,) = {_said(rank) for rank in ranks}
    folder, name = said.split()
    assert name == f"hub:owner/name@{COMMIT}"
    assert snapshot_of_folder(Path(folder)) == ("owner/name", COMMIT)
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in files} == {f: FILES[f] for f in WANTED}
    assert fetched == dict.fromkeys(WANTED, 1)
    for again in ("hub:owner/name", f"hub:owner/name@{COMMIT}"):
        assert _said(_start(tmp_path, again, HF_HUB_OFFLINE="1")) == said
    assert fetched == dict.fromkeys(WANTED, 1)


@pytest.mark.parametrize(("name", "offline"), [("hub:owner/other", "0"), ("hub:owner/name", "1"), ("hub:a/b/c", "1")])
def test_what_the_hub_does_not_give_is_one_message(
    tmp_path: Path, hub: tuple[str, Counter[str]], name: str, offline: str
) -> None:
    said = _said(_start(tmp_path, name, HF_ENDPOINT=hub[0], HF_HUB_OFFLINE=offline))
    assert said.startswith(f"student.folder {name}: cannot be downloaded from the hub (")
    assert len(said.splitlines()) == 1


def test_without_the_extra_a_hub_id_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"student.adapter hub:some/thing: a hub id needs the extra: pip install"):
        resolve_folder("hub:some/thing", "student.adapter")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    assert pin_commit(str(tmp_path)) == str(tmp_path)
    assert snapshot_of_folder(tmp_path) is None
    with pytest.raises(UsageError, match="--teacher no/where: no such folder"):
        local_folder("no/where", "--teacher")
