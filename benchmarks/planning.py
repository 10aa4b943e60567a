"""How much memory does planning an export take, and how soon is its first token scored, at any size of corpus?

Command:  python -m benchmarks.planning [seconds] [gigabytes of text …]
For each size it writes a corpus of random sentences as JSON lines. It starts `launchers.export_teacher` with a tiny
teacher twice, for all of the corpus and for 200,000 tokens drawn from it, and ends it once the corpus has been read,
or after so many seconds. Prints the time until the pilot of the first shard was scored, how much of the corpus was read
and in which time, and the largest memory of all its processes (proportional set sizes: shared pages count once).
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.export.spool.pass_state import part_states
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


def bytes_read(spool: Path) -> int:
    """Bytes of the corpus that are in the parts of a spool."""
    return sum(state.bytes for state in part_states(spool))


def measure(teacher: Path, corpus: Path, out: Path, tokens: str, seconds: float) -> dict[str, float]:
    """Runs an export until its corpus is read, or for so many seconds."""
    settings = [f"teacher={teacher}", f"corpus.path={corpus}", f"train_tokens={tokens}", "validation_tokens=4096"]
    settings += ["selection.top_k=8", "row_length=256", "dtype=float32", "shard_bytes=200000"]
    flags = [f"--config={item}" for item in ("quickstart_export", *settings)]
    began, peak, first, read, elapsed = time.monotonic(), 0.0, 0.0, 0, 0.0
    with subprocess.Popen([sys.executable, "-m", "launchers.export_teacher", *flags, f"--out={out}"]) as process:
        while process.poll() is None and elapsed < seconds and read < corpus.stat().st_size * 0.99:
            peak = max(peak, memory_mb(process.pid))
            elapsed = time.monotonic() - began
            if not first and (out / "train" / "tables.tar").exists():
                first = elapsed
            read = sum(map(bytes_read, out.parent.glob(f"{out.name}.spool/*")))
            time.sleep(0.5)
        process.terminate()
    shutil.rmtree(out.with_name(f"{out.name}.spool"), ignore_errors=True)
    return {"first": first, "seconds": elapsed, "peak": peak, "read": read / corpus.stat().st_size}


def main() -> None:
    seconds, sizes = float((sys.argv[1:2] or ["3600"])[0]), sys.argv[2:] or ["0.1", "1", "5"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = (ROOT / "WORKSPACE.md").read_text()
        teacher = make_teacher(folder / "teacher", [text] * 4, vocab=2048)
        print("| text | train_tokens | first shard's pilot scored after | read | in | largest memory |")
        print("|---|---|---|---|---|---|", flush=True)
        for size in sizes:
            corpus = folder / f"{size}.jsonl"
            write_corpus(corpus, int(float(size) * 1e9))
            for tokens in ("none", "200000"):
                found = measure(teacher, corpus, folder / f"out-{size}-{tokens}", tokens, seconds)
                shown = (
                    f"{found['first']:.0f} s | {found['read']:.0%} | {found['seconds']:.0f} s | {found['peak']:.0f} MB"
                )
                print(f"| {size} GB | {tokens} | {shown} |", flush=True)
            corpus.unlink()


if __name__ == "__main__":
    main()
