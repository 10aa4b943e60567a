"""Show what is in a teacher's cache, or verify every byte of it.

    python -m launchers.inspect quickstart/cache/train
    python -m launchers.inspect quickstart/cache/train --records=3 --positions=0
    python -m launchers.inspect quickstart/cache/train --html=runs/cache.html
    python -m launchers.inspect quickstart/cache/train --verify

Shows the teacher and the corpus, what is kept of a position and how, the bytes of a position by part, and the mass on
the teacher's likeliest K = 1, 8, 64 and all entries. Then it shows records as text, each position with the teacher's
alternatives: one record, and 20 positions of it, unless flags ask for more. The text comes from the tokenizer of the
teacher that made the cache, or of a folder `teacher` beside the cache. Without either, name one with --tokenizer.

--verify reads every byte and checks hashes, members, counts, ids, masses, labels and the figures of the manifest. It
lists all errors by shard, block and member, and ends with status 1 if there is any.
"""

if __name__ == "inspect":  # `python launchers/NAME.py` puts this folder before the standard library
    from cli.start_by_file import restart_as_module  # pyright: ignore[reportMissingImports]

    restart_as_module()

import itertools
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launchers.cli import app

if TYPE_CHECKING:
    from data.cache.inspection.readable import IdToText
    from data.cache.manifest import Manifest
    from data.cache.record import Record

VERIFY = flags.DEFINE_bool("verify", False, "Read and check every byte; nothing else is shown.")
RECORDS = flags.DEFINE_integer("records", 1, "Records shown in the terminal.", lower_bound=0)
POSITIONS = flags.DEFINE_integer("positions", 20, "Positions of a record shown in the terminal; 0: all.", lower_bound=0)
HTML = flags.DEFINE_string("html", None, "Write one HTML page, with everything in it, to this file.")
HTML_RECORDS = flags.DEFINE_integer("html_records", 20, "Records in the HTML page.", lower_bound=0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of the teacher's tokenizer, where it is not found.")
HEAD_LINES = 2  # of a record: its name and the titles of the columns
ALTERNATIVES = flags.DEFINE_integer("alternatives", 5, "Alternatives shown of a position.", lower_bound=1)


def _missing(manifest: "Manifest") -> str:
    teacher = manifest.made.get("teacher", "unknown")
    location = "beside the cache" if teacher == "unknown" else f"in {teacher}, the teacher's folder"
    return f"the tokenizer {manifest.tokenizer[:12]}… is not {location}"


def _print_records(records: "list[Record]", words: "IdToText") -> None:
    from launchers.reports import records_page

    width = shutil.get_terminal_size((100, 24)).columns
    for record in records[: RECORDS.value]:
        most = POSITIONS.value or record.positions
        lines = records_page.terminal_lines(record, words, ALTERNATIVES.value, width)
        print("", *itertools.islice(lines, HEAD_LINES + most), sep="\n")
        if record.positions > most:
            print(f"    … {record.positions - most} more positions: --positions=0, or --html=FILE")


def show_cache(folder: Path | str) -> None:
    """Prints what is in the cache, and writes the page if --html names one."""
    from tqdm import tqdm

    from data.cache.inspection.readable import escape_unprintable, find_tokenizer, id_to_text
    from data.cache.inspection.survey import survey_cache
    from data.cache.manifest import read_manifest
    from kd_core.files import write_text
    from kd_core.hub import resolve_folder
    from launchers.reports import records_page
    from launchers.reports.cache_description import describe_cache, part_costs

    count = max(RECORDS.value, HTML_RECORDS.value if HTML.value else 0)
    manifest = read_manifest(folder)
    with tqdm(total=manifest.positions, unit="pos", unit_scale=True, delay=1, desc="reading", leave=False) as bar:
        survey, records = survey_cache(folder, manifest, count, bar.update)
    named = None if TOKENIZER.value is None else resolve_folder(TOKENIZER.value, "--tokenizer")
    tokenizer = find_tokenizer(folder, manifest, named)
    words = id_to_text(tokenizer)
    print(f"{escape_unprintable(str(folder))}\n")
    for name, line in describe_cache(manifest, survey):
        print(f"  {name:<14} {escape_unprintable(line)}")
    print("\n  bytes                              all   a position")
    for name, size, per_position in part_costs(survey):
        print(f"  {name:<26} {size:>12,} {per_position:>10.2f}")
    coverage = survey.coverage(manifest.selection.top_k)
    if coverage:
        print("\n  teacher's mass on its likeliest, over all positions")
    for name, mass in coverage:
        print(f"  {name:<14} {mass:.4f}")
    if tokenizer is None and records:
        print(escape_unprintable(f"\nids, not text: {_missing(manifest)}. Name its folder with --tokenizer=DIR."))
    _print_records(records, words)
    if HTML.value:
        tables = records_page.PageTables(str(folder), describe_cache(manifest, survey), part_costs(survey), coverage)
        page = records_page.html_page(tables, records[: HTML_RECORDS.value], words, ALTERNATIVES.value)
        Path(HTML.value).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(HTML.value), page)
        print(f"\nwrote {HTML.value} ({len(records[: HTML_RECORDS.value])} records)")


def verify_cache(folder: Path | str) -> None:
    """Verifies the cache, prints all errors, and exits with status 1 if there is any."""
    from tqdm import tqdm

    from data.cache.inspection.readable import escape_unprintable
    from data.cache.inspection.verify import verify
    from data.cache.manifest import read_manifest

    started = time.perf_counter()
    with ExitStack() as stack:
        total = read_manifest(folder).positions
        bar = stack.enter_context(
            tqdm(total=total, unit="pos", unit_scale=True, delay=1, desc="verifying", leave=False)
        )
        checked = verify(folder, bar.update)
    seconds = time.perf_counter() - started
    for problem in checked.problems:
        print(escape_unprintable(problem))
    if checked.more:
        print(f"and {checked.more} more")
    problem_count = len(checked.problems) + checked.more
    print(
        f"{escape_unprintable(str(folder))}: {f'{problem_count} problems' if problem_count else 'whole'}; verified "
        f"{checked.bytes} bytes, {checked.records} records, {checked.positions} positions in {seconds:.1f} s "
        f"({checked.bytes / seconds / 1e6:.1f} MB/s, {checked.positions / seconds:,.0f} positions/s)"
    )
    if problem_count:
        raise SystemExit(1)


def main(cache: str) -> None:
    """Shows the cache, or verifies it with --verify."""
    from data.storage.storage import is_url

    folder = cache if is_url(cache) else Path(cache)
    try:
        (verify_cache if VERIFY.value else show_cache)(folder)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    app.run_command(main, "launchers.inspect", __doc__ or "", arguments=("CACHE",))
