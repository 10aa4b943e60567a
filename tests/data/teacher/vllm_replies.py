"""A tiny teacher, and the replies of a real vLLM server that served it, replayed by a server of the same interface.

`vllm_replies.jsonl` holds a reply a line: path, body, status, and its bytes as latin-1.
To record it anew, where vLLM is installed:

    python -m tests.data.teacher.vllm_replies tests/data/teacher/vllm_replies.jsonl
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from data.cache.selection import Selection
from data.corpus.corpus import Corpus
from data.export.teacher_export import TeacherExport
from data.teacher.choose_scorer import load_vllm
from data.teacher.scorer import AnyScorer, score_rows
from data.teacher.select import TeacherScores
from data.teacher.vllm_settings import VllmSettings
from kd_core.files import write_json
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Random, build_student
from tests.tiny import make_corpus, make_tokenizer, write_caches

FILE = Path(__file__).with_suffix(".jsonl")
ROW_LENGTH, TOP_K, MOST_LOGPROBS, CONTEXT = 16, 6, 8, 40
Reply = tuple[int, str]
CPU, POOLING = torch.device("cpu"), {"runner": "pooling"}
POOLER = '{"task": "token_embed", "pooling_type": "ALL", "use_activation": false}'


def make_folders(root: Path) -> tuple[Path, Path]:
    """A teacher of random weights whose attention heads are of a size that vLLM's CPU kernels have, and a corpus."""
    teacher, corpus = root / "teacher", root / "corpus"
    teacher.mkdir(parents=True)
    make_corpus(corpus, documents=4)
    vocab = make_tokenizer(teacher, [path.read_text() for path in sorted(corpus.iterdir())]).get_vocab_size()
    arch = Architecture(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
        rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=256,
    )  # fmt: skip
    write_json(teacher / "config.json", config_fields(arch, 0, 0))
    model = build_student(Random(str(teacher), 64, 96, 2, 2, 1, init_std=0.1), torch.device("cpu"), seed=1)
    with torch.no_grad():
        model.lm_head.weight *= 3  # distributions that are neither flat nor certain
    save_pretrained(model, root / "made", teacher)
    (root / "made" / "model.safetensors").rename(teacher / "model.safetensors")
    return teacher, corpus


def tiny_export(teacher: Path, corpus: Path, **changes: Any) -> TeacherExport:
    settings: dict[str, Any] = {
        "train_tokens": None, "validation_tokens": None, "selection": Selection(TOP_K), "row_length": ROW_LENGTH,
        "validation_share": 0.25, "block_positions": 64, "shard_bytes": 1500, "batch_rows": 3, "dtype": "float32",
        "codec": "lossless", "scorer": "vllm",
    }  # fmt: skip
    return TeacherExport(Corpus(str(corpus)), str(teacher), **{**settings, **changes})


def _key(path: str, body: bytes) -> str:
    return json.dumps([path, json.loads(body or b"null")], sort_keys=True)


def read_replies() -> dict[str, Reply]:
    lines = [json.loads(line) for line in FILE.read_text().splitlines()]
    return {json.dumps([path, body], sort_keys=True): (status, text) for path, body, status, text in lines}


@contextlib.contextmanager
def answering(answer: Callable[[str, bytes], Reply]) -> Generator[str]:
    """Serves what `answer` makes of a path and a body, and yields the URL. A status of 0 breaks the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = answer(self.path, body)
            if status == 0:
                self.connection.close()
                return
            data = text.encode("latin-1")
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if 300 <= status < 400:
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *args: Any) -> None:
            del args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def replay(path: str, body: bytes) -> Reply:
    """The recorded reply. A request that was not recorded is an error of the test."""
    return read_replies()[_key(path, body)]


@contextlib.contextmanager
def real_server(folder: Path, *flags: str) -> Generator[str]:
    """Serves a folder with vLLM on the CPU, and yields the URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
    ]
    more = ["--port", str(port), "--dtype", "float32", "--enforce-eager", *flags]
    server = subprocess.Popen([*command, *more], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
                break
            assert server.poll() is None, "the server ended"
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def hand_on(upstream: str, kept: dict[str, Reply], path: str, body: bytes) -> Reply:
    """Sends a request on, and keeps the reply."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(upstream + path, body or None, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            answer = reply.status, reply.read().decode("latin-1")
    except urllib.error.HTTPError as error:
        answer = error.code, error.read().decode("latin-1")
    return kept.setdefault(_key(path, body), answer)


def score_some_rows(scorer: AnyScorer) -> TeacherScores:
    """Scores of two rows, one of them short, with samples and tails at further temperatures."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 8, [1] * 3 + [-1] * 5])
    uniforms = torch.rand(16, 4, generator=generator, dtype=torch.float64)
    selection = Selection(TOP_K, draws=4, tail_temperatures=(0.5, 2.0))
    scores = score_rows(scorer, torch.randint(300, (2, 9), generator=generator), documents, selection, uniforms)
    return TeacherScores(*(field[(documents >= 0).flatten()] for field in scores))


def refused_export(teacher: Path, corpus: Path, url: str, out: Path, **changes: Any) -> str:
    """The message of an export that stops."""
    try:
        write_caches(tiny_export(teacher, corpus, scorer_url=url, **changes), out)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def record(file: Path) -> None:
    """Exports through a server that hands every request on to vLLM, and keeps its replies."""
    kept: dict[str, Reply] = {}
    with tempfile.TemporaryDirectory() as root:
        teacher, corpus = make_folders(Path(root))
        flags = ["--max-logprobs", str(MOST_LOGPROBS), "--max-model-len", str(CONTEXT), "--served-model-name", "tiny"]
        with real_server(teacher, *flags) as upstream, answering(partial(hand_on, upstream, kept)) as url:
            write_caches(tiny_export(teacher, corpus, scorer_url=url), Path(root) / "out")
            print(refused_export(teacher, corpus, url, Path(root) / "k", selection=Selection(MOST_LOGPROBS + 1)))
            print(refused_export(teacher, corpus, url, Path(root) / "p", vllm=POOLING))
        with (
            real_server(teacher, *flags, "--runner", "pooling", "--pooler-config", POOLER) as upstream,
            answering(partial(hand_on, upstream, kept)) as url,
        ):
            score_some_rows(load_vllm(teacher, torch.float32, CPU, VllmSettings(POOLING, url)))
    for key, (status, text) in kept.items():
        kept[key] = status, text.replace(root, "ROOT")
    lines = [[*json.loads(key), *answer] for key, answer in kept.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=str)))
    print(f"{len(kept)} replies, {file.stat().st_size} bytes")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
