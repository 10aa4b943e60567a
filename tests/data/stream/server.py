"""A web server of this machine's files, which can be told to misbehave."""

import re
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Behaviour:
    """What was asked for; how many answers for shards are cut short, hang or fail; with a status in place of a file.

    `delay` are seconds before each answer. `most_at_once` counts requests for shards that waited together. Without
    `ranges` the server sends whole files, as `http.server` does.
    """

    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cut_short: int = 0
    hang: int = 0
    status: int = 0
    failing: int = -1  # answers that fail with `status`, or all
    fails_from: int = 0  # answers for shards before the first that fails
    delay: float = 0.0
    ranges: bool = True
    now: int = 0
    most_at_once: int = 0
    counting: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)


def is_shard(name: str) -> bool:
    """Tars of blocks, and not their indexes."""
    return name.startswith("shard") and name.endswith(".tar")


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: object, behaviour: Behaviour, directory: str) -> None:
        self.behaviour = behaviour
        super().__init__(*arguments, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        does, path = self.behaviour, Path(self.translate_path(self.path))
        does.asked.append(path.name)
        does.headers.append({name.lower(): value for name, value in self.headers.items()})
        if is_shard(path.name):
            self._wait(does)
        shards = sum(map(is_shard, does.asked))
        if does.status and does.failing and shards >= does.fails_from:
            does.failing -= 1
            return self.send_error(does.status)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if does.ranges else None
        if not path.is_file() or (match is None and not (does.cut_short or does.hang)):
            return super().do_GET()
        payload = path.read_bytes()
        start, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(payload))
        part = payload[start:end]
        if match and not part:
            return self.send_error(416)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(payload)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if is_shard(path.name) and (does.cut_short or does.hang):
            self.wfile.write(part[:700])
            self.wfile.flush()
            if does.cut_short:
                does.cut_short -= 1
            else:
                does.hang -= 1
                does.released.wait(30)
            self.close_connection = True
            return None
        self.wfile.write(part)
        return None

    def _wait(self, does: Behaviour) -> None:
        with does.counting:
            does.now += 1
            does.most_at_once = max(does.most_at_once, does.now)
        time.sleep(does.delay)
        with does.counting:
            does.now -= 1

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Generator[tuple[str, Behaviour]]:
    """The URL of the folder, and what the server does."""
    behaviour = Behaviour()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, behaviour=behaviour, directory=str(folder)))
    server.daemon_threads = True  # of connections that a client keeps open
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        behaviour.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
