"""All figures of one GPU in a few minutes: rates, losses, training steps, FSDP2, export, traces, and a page of them.

    make gpu                                                       # the tests on the GPU first, then this
    python -m benchmarks.gpu.device --out gpu --seconds 240
    python -m benchmarks.gpu.device --out gpu --parts loss,step    # adds to the numbers in the folder
    python -m benchmarks.gpu.device --out gpu --device cpu --tiny  # the same code on small sizes

Each part appends to OUT/numbers.jsonl as it goes. What fails is recorded there, and the rest goes on. What finds no
time left is recorded as skipped. At the end OUT/results.md has the tables. Keep it as benchmarks/results/DATE-gpu.md.
"""

import argparse
import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import loss, probe, scoring, training
from benchmarks.gpu.results import page, read_numbers
from benchmarks.gpu.session import Session
from kd_core.parallel.world import use_device

RESULTS = Path(__file__).parent.parent / "results"
PARTS: dict[str, Callable[[Session], None]] = {
    "probe": probe.run, "loss": loss.run, "step": training.run, "export": scoring.run, "fsdp": training.run_fsdp,
    "trace": training.run_trace, "compiled": training.run_compiled,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order, separated by commas")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts.split(",")) - {*PARTS}:
        parser.error(f"--parts: got {', '.join(sorted(unknown))}; wanted some of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; try --device cpu --tiny")
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(torch.device(args.device), args.out, args.seconds, args.tiny)
    if session.on_gpu:
        use_device(torch.device("cuda", session.device.index or 0))
    try:
        for part in args.parts.split(","):
            if session.left() < 10:
                session.record(part, "the whole part", skipped="no time is left")
            else:
                session.attempt(part, "the whole part", partial(PARTS[part], session))
    finally:
        write_page(session)


def write_page(session: Session) -> None:
    """Writes the page of all numbers in the session's folder."""
    estimates = max(RESULTS.glob("*-roofline.md")).read_text()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    numbers = read_numbers(session.out / "numbers.jsonl")
    path = session.out / "results.md"
    path.write_text(page(numbers, estimates, session.device_name, today, session.tiny))
    print(f"wrote {path} after {session.seconds - session.left():.0f} s")


if __name__ == "__main__":
    main()
