"""How much memory does planning an export take, and how soon is its first token scored, at any size of corpus?

Command:  python -m benchmarks.planning [train_tokens, or none] [gigabytes of text …]
For each size it writes a corpus of random sentences as JSON lines, starts `launchers.export_teacher` with a tiny
teacher, and ends it once the whole corpus has been read. Prints the time until the pilot of the first shard was scored,
the time until the corpus was read, and the largest memory of all its processes (proportional set sizes, in which shared
pages count once).
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.tiny import make_teacher

ROOT = Path(__file__).parent.parent
DOCUMENT_WORDS = (50, 1000)


def write_corpus(path: Path, size: int) -> None:
    """JSON lines of random sentences, of so many bytes in all."""
    words = sorted(set(re.findall(r"[A-Za-z]{2,}", (ROOT / "WORKSPACE.md").read_text())))
    choice, written = random.Random(0), 0  # noqa: S311
    # Lines are put together from paragraphs, because drawing every word would take longer than the measurement.
    paragraphs = [" ".join(choice.choices(words, k=50)) + "." for _ in range(2000)]
    with path.open("w") as file:
        while written < size:
            number = choice.randint(*DOCUMENT_WORDS) // 50 + 1
            text = f"{written} " + " ".join(choice.choices(paragraphs, k=number))
            written += file.write(json.dumps({"text": text}) + "\n")


def processes_of(root: int) -> Iterator[int]:
    """A process, and all that it and they have started."""
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for pid in children.read_text().split():
            yield from processes_of(int(pid))


def memory_mb(root: int) -> float:
    """Proportional set sizes of a process and its children."""
    total = 0
    try:
        for pid in processes_of(root):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.findall(r"^Pss:\s+(\d+)", rollup, flags=re.MULTILINE)[0])
    except (OSError, IndexError):  # one has just ended
        return 0.0
    return total / 1024


def measure(teacher: Path, corpus: Path, out: Path, tokens: str) -> dict[str, float]:
    """Runs an export until its corpus is read."""
    settings = [f"teacher={teacher}", f"corpus.path={corpus}", f"train_tokens={tokens}", "validation_tokens=4096"]
    settings += ["selection.top_k=8", "row_length=256", "dtype=float32"]
    flags = [f"--config={item}" for item in ("quickstart_export", *settings)]
    began, peak, first = time.monotonic(), 0.0, 0.0
    with subprocess.Popen([sys.executable, "-m", "launchers.export_teacher", *flags, f"--out={out}"]) as process:
        while process.poll() is None and not any(out.parent.glob("*.spool/*/end.json")):
            peak = max(peak, memory_mb(process.pid))
            if not first and (out / "train" / "tables.tar").exists():
                first = time.monotonic() - began
            time.sleep(0.2)
        read = time.monotonic() - began
        while not first and process.poll() is None:
            first = time.monotonic() - began if (out / "train" / "tables.tar").exists() else 0.0
            time.sleep(0.05)
        process.terminate()
    return {"first": first, "read": read, "peak": peak}


def main() -> None:
    tokens, sizes = (sys.argv[1:2] or ["none"])[0], sys.argv[2:] or ["0.1", "1", "5"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = (ROOT / "WORKSPACE.md").read_text()
        teacher = make_teacher(folder / "teacher", [text] * 4, vocab=2048)
        print(f"train_tokens={tokens}")
        print("| text | first tokens scored after | corpus read after | largest memory |\n|---|---|---|---|")
        for size in sizes:
            corpus = folder / f"{size}.jsonl"
            write_corpus(corpus, int(float(size) * 1e9))
            found = measure(teacher, corpus, folder / f"out-{size}", tokens)
            corpus.unlink()
            print(
                f"| {size} GB | {found['first']:.0f} s | {found['read']:.0f} s | {found['peak']:.0f} MB |", flush=True
            )


if __name__ == "__main__":
    main()
