"""A server of files on this machine, which can be told to misbehave."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Behaviour:
    """What was asked for; how many answers for shards are cut short or hang; with a status in place of a file."""

    asked: list[str] = field(default_factory=list)
    cut_short: int = 0
    hang: int = 0
    status: int = 0
    released: threading.Event = field(default_factory=threading.Event)


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, behaviour: Behaviour, directory: str) -> None:
        self.behaviour = behaviour
        super().__init__(*arguments, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        does, path = self.behaviour, Path(self.translate_path(self.path))
        does.asked.append(path.name)
        if does.status:
            return self.send_error(does.status)
        misbehaves = path.name.startswith("shard") and path.is_file()
        if misbehaves and (does.cut_short or does.hang):
            payload = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload[:700])
            if does.cut_short:
                does.cut_short -= 1
            else:
                does.hang -= 1
                does.released.wait(30)
            self.close_connection = True
            return None
        return super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Generator[tuple[str, Behaviour]]:
    """The URL of the folder, and what the server does."""
    behaviour = Behaviour()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, behaviour=behaviour, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        behaviour.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
