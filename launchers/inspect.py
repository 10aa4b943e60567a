"""Show what is in a teacher's cache, or verify every byte of it.

    python -m launchers.inspect quickstart/cache/train
    python -m launchers.inspect quickstart/cache/train --records=3 --positions=0
    python -m launchers.inspect quickstart/cache/train --html=cache.html
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags

from launchers.cli import app

if TYPE_CHECKING:
    from data.cache.inspection.readable import IdToText
    from data.cache.inspection.survey import Survey
    from data.cache.manifest import Manifest
    from data.cache.record import Record
    from data.tokenizer import Tokenizer

VERIFY = flags.DEFINE_bool("verify", False, "Read and check every byte; nothing else is shown.")
RECORDS = flags.DEFINE_integer("records", 1, "Records shown in the terminal.", lower_bound=0)
POSITIONS = flags.DEFINE_integer("positions", 20, "Positions of a record shown in the terminal; 0: all.", lower_bound=0)
HTML = flags.DEFINE_string("html", None, "Write one HTML page, with everything in it, to this file.")
HTML_RECORDS = flags.DEFINE_integer("html_records", 20, "Records in the HTML page.", lower_bound=0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of the teacher's tokenizer, where it is not found.")
HEAD_LINES = 2  # of a record: its name and the titles of the columns
ALTERNATIVES = flags.DEFINE_integer("alternatives", 5, "Alternatives shown of a position.", lower_bound=1)


def describe_cache(manifest: "Manifest", survey: "Survey") -> list[tuple[str, str]]:
    """Returns the titled lines that describe a cache."""
    audit, selection, n = manifest.audit, manifest.selection, max(1, survey.positions)
    teacher = manifest.teacher
    shape = teacher["architecture"] if isinstance(teacher.get("architecture"), dict) else {}
    layers = f"{shape.get('num_layers')} layers of {shape.get('hidden_size')}, " if "num_layers" in shape else ""
    lines = [
        ("teacher", f"{layers}{teacher.get('dtype', '')}, weights {str(teacher.get('weights'))[:12]}…"),
        ("tokenizer", f"{manifest.tokenizer[:12]}…, vocabulary of {manifest.vocab_size:,}"),
        *_beginnings(manifest),
        ("kept", selection.words() + _further(selection)),
        ("codec", f"{manifest.codec}; KL(original‖decoded) mean {audit.kl_mean:.1e}, worst {audit.kl_worst:.1e} nats"),
        ("", f"mass of the entries off by {audit.mass_error:.1e} at the most"),
        ("size", f"{survey.records:,} records, {survey.positions:,} positions ({survey.scored / n:.1%} scored)"),
        ("", f"{len(manifest.shards)} shards, {sum(len(s.blocks) for s in manifest.shards)} blocks"),
        ("entries", _spread(survey.entries) if selection.top_k else "none"),
        ("samples", _spread(survey.samples) if selection.draws else "none"),
        ("teacher NLL", f"{survey.nll / n:.4f} nats a position"),
        ("label is kept", f"at {survey.inside / n:.1%} of positions"),
    ]
    return [*lines, *(("plan", _plan(plan)) for plan in manifest.plans)]


def _beginnings(manifest: "Manifest") -> list[tuple[str, str]]:
    """Returns the line of what texts begin with, or none if the cache may hold no texts or was converted."""
    if ids := manifest.text_begins_with:
        return [("texts begin with", " ".join(map(str, ids)))]
    may_lack_texts = any(plan.get("chat_template", "unknown") is not None for plan in manifest.plans)
    return [] if may_lack_texts else [("texts begin with", "nothing more")]


def _further(selection: Any) -> str:
    drawn = f", drawn at temperature {selection.proposal_temperature:g}" if selection.proposal_temperature != 1 else ""
    tails = ", ".join(f"{t:g}" for t in selection.tail_temperatures)
    return drawn + (f"; tail also at temperature {tails}" if tails else "")


def _spread(spread: Any) -> str:
    return f"{spread.mean:.2f} a position (from {spread.least} to {spread.most})"


def _plan(plan: dict[str, Any]) -> str:
    corpus = plan.get("corpus")
    fingerprint = corpus.get("fingerprint", corpus) if isinstance(corpus, dict) else corpus
    tokens = "all" if plan.get("tokens") is None else plan["tokens"]
    skipped = _skipped(corpus.get("skipped")) if isinstance(corpus, dict) else ""
    return f"{plan.get('split')} of corpus {str(fingerprint)[:12]}…, {tokens} tokens, seed {plan.get('seed')}{skipped}"


def _skipped(counts: Any) -> str:
    """Returns how many rows of the corpus were skipped, and why. Others may have written the counts."""
    named = counts.items() if isinstance(counts, dict) else ()
    numbers = {reason: count for reason, count in named if type(count) is int}
    reasons = ", ".join(f"{count} {reason}" for reason, count in numbers.items())
    return f"; {sum(numbers.values())} rows skipped: {reasons}" if numbers else ""


def part_costs(survey: "Survey") -> list[tuple[str, int, float]]:
    """Returns the parts with their bytes and bytes per position, the largest first and the sum last."""
    n = max(1, survey.positions)
    parts = sorted(survey.bytes.items(), key=lambda part: -part[1])
    return [(name, size, size / n) for name, size in [*parts, ("all", survey.total_bytes)]]


def find_tokenizer(folder: Path, manifest: "Manifest") -> "Tokenizer | None":
    """Returns the tokenizer of --tokenizer, or of the teacher that made the cache, or None.

    Raises:
        UsageError: the cache was written with another tokenizer than that of --tokenizer.
    """
    from data.cache.inspection.readable import tokenizer_folders
    from data.tokenizer import Tokenizer
    from kd_core.errors import UsageError
    from kd_core.hub import resolve_folder

    fingerprint, teacher = manifest.tokenizer, manifest.made.get("teacher")
    if TOKENIZER.value is not None:
        tokenizer = Tokenizer(resolve_folder(TOKENIZER.value, "--tokenizer"))
        if tokenizer.fingerprint_like(fingerprint) != fingerprint:
            raise UsageError(
                f"--tokenizer={TOKENIZER.value}: fingerprint {tokenizer.fingerprint()[:12]}…; the cache was "
                f"written with {fingerprint[:12]}…. Name the teacher's folder."
            )
        return tokenizer
    for tokenizer_folder in tokenizer_folders(folder, teacher if isinstance(teacher, str) else ""):
        with suppress(UsageError, OSError):  # the cache names the teacher, and others may have written it
            if (tokenizer := Tokenizer(tokenizer_folder)).fingerprint_like(fingerprint) == fingerprint:
                return tokenizer
    return None


def _missing(manifest: "Manifest") -> str:
    teacher = manifest.made.get("teacher", "unknown")
    location = "beside the cache" if teacher == "unknown" else f"in {teacher}, the teacher's folder"
    return f"the tokenizer {manifest.tokenizer[:12]}… is not {location}"


def _read_cache(folder: Path, count: int) -> "tuple[Manifest, Survey, list[Record]]":
    """Reads the whole cache. Returns its manifest, its survey, and its first records."""
    from tqdm import tqdm

    from data.cache.inspection.scan import read_coding, scan_blocks
    from data.cache.inspection.survey import Survey
    from data.cache.manifest import read_manifest
    from kd_core.errors import UsageError

    def refuse(location: str, problem: str) -> NoReturn:
        raise UsageError(f"{folder / location}: {problem}. See all that is wrong by --verify.")

    manifest, survey, first_records = read_manifest(folder), Survey(), list["Record"]()
    coding = read_coding(folder, manifest, refuse)
    with tqdm(total=manifest.positions, unit="pos", unit_scale=True, delay=1, desc="reading", leave=False) as bar:
        for visited in scan_blocks(folder, manifest, coding, refuse):
            survey.add(visited)
            first_records += visited.records[: count - len(first_records)]
            bar.update(visited.header.positions)
    survey.add_files(folder, manifest)
    return manifest, survey, first_records


def _print_records(records: "list[Record]", words: "IdToText") -> None:
    from launchers.reports import records_page

    width = shutil.get_terminal_size((100, 24)).columns
    for record in records[: RECORDS.value]:
        most = POSITIONS.value or record.positions
        lines = records_page.terminal_lines(record, words, ALTERNATIVES.value, width)
        print("", *itertools.islice(lines, HEAD_LINES + most), sep="\n")
        if record.positions > most:
            print(f"    … {record.positions - most} more positions: --positions=0, or --html=FILE")


def show_cache(folder: Path) -> None:
    """Prints what is in the cache, and writes the page if --html names one."""
    from data.cache.inspection.readable import escape_unprintable, id_to_text
    from kd_core.files import write_text
    from launchers.reports import records_page

    count = max(RECORDS.value, HTML_RECORDS.value if HTML.value else 0)
    manifest, survey, records = _read_cache(folder, count)
    tokenizer = find_tokenizer(folder, manifest)
    words = id_to_text(tokenizer)
    print(f"{escape_unprintable(str(folder))}\n")
    for name, line in describe_cache(manifest, survey):
        print(f"  {name:<14} {escape_unprintable(line)}")
    print("\n  bytes                              all   a position")
    for name, size, per_position in part_costs(survey):
        print(f"  {name:<26} {size:>12,} {per_position:>10.2f}")
    coverage = survey.coverage(manifest.selection.top_k)
    if coverage:
        print("\n  teacher's mass on its likeliest")
    for name, mass in coverage:
        print(f"  {name:<14} {mass:.4f}")
    if tokenizer is None and records:
        print(escape_unprintable(f"\nids, not text: {_missing(manifest)}. Name its folder with --tokenizer=DIR."))
    _print_records(records, words)
    if HTML.value:
        tables = records_page.PageTables(str(folder), describe_cache(manifest, survey), part_costs(survey), coverage)
        page = records_page.html_page(tables, records[: HTML_RECORDS.value], words, ALTERNATIVES.value)
        write_text(Path(HTML.value), page)
        print(f"\nwrote {HTML.value} ({len(records[: HTML_RECORDS.value])} records)")


def verify_cache(folder: Path) -> None:
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
    folder = Path(cache)
    try:
        (verify_cache if VERIFY.value else show_cache)(folder)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    app.run_command(main, "launchers.inspect", __doc__ or "", arguments=("CACHE",))
