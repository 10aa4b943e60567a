"""Settings of the quick start for the user's own teacher or corpus, measured on the cache or computed from it."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.cache.manifest import Manifest

ROW_LENGTH = 512
# A cache of fewer than STEPS steps is read up to four times.
STEPS, LEAST_STEPS = 60, 10
PROMPTS, PROMPT_TOKENS, MOST_PROMPT_TOKENS = 2, 12, 200


def first_stage(teacher: str | None, corpus: str | None) -> str:
    """Returns the title of the first stage, which takes what the user named, and fetches and checks the rest."""
    own_inputs = {"teacher": teacher, "corpus": corpus}
    own_names = " and ".join(name for name, value in own_inputs.items() if value)
    fetched_names = " and ".join(name for name, value in own_inputs.items() if not value)
    if not own_names:
        return "Fetch teacher and corpus, checked by sha256"
    return f"Take your {own_names}" + (f", fetch the {fetched_names}, checked by sha256" if fetched_names else "")


def row_length_items(teacher: str) -> list[str]:
    """Returns the setting of the row length if the teacher's context is shorter than the quick start's rows."""
    from kd_core.students.huggingface.config_json import read_architecture

    arch = read_architecture(Path(teacher))
    length = arch.longest_document or arch.max_positions
    return [f"tag:RowLength={length}"] if length < ROW_LENGTH else []


def measure_layers(teacher: str, cache: Path, out: Path) -> str:
    """Returns the setting that keeps the half of the layers with the most influence on the cache's text.

    Raises:
        UsageError: the layers could not be measured.
    """
    from kd_core.errors import UsageError
    from kd_core.files import damage_as_usage_error, read_json
    from kd_core.students.huggingface.config_json import read_architecture

    count = read_architecture(Path(teacher)).num_layers
    if count < 2:
        return "student.keep_layers=none"
    if not out.exists():
        flags = [f"--teacher={teacher}", f"--cache={cache}", "--measure=influence", f"--keep={count // 2}"]
        command = [sys.executable, "-m", "launchers.importance", *flags, f"--out={out}"]
        if subprocess.run(command, check=False).returncode:
            raise UsageError(
                f"{teacher}: its layers could not be measured (above). Name them: --config=student.keep_layers=…"
            )
    with damage_as_usage_error(out, "measured layers", "Delete it and run the same command again"):
        return f"student.keep_layers={tuple(int(i) for i in read_json(out, 'measured layers')['keep_layers'])}"


def step_items(cache: Path, items: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Returns settings of the steps: one epoch over the cache, or up to `EPOCHS` if it is small."""
    from data.cache.manifest import read_manifest
    from experiments.base.checks import EPOCHS
    from experiments.config.config_items import resolve_items

    config = resolve_items([*items, *changes], "Experiment").config
    length = config.collate.row_length
    tokens = max(1, config.tokens_per_step // length) * length
    epoch = read_manifest(cache).positions // tokens
    steps = max(epoch, min(STEPS, EPOCHS * epoch), LEAST_STEPS)
    return [f"tokens_per_step={tokens}", f"steps={steps}", f"tag:Interval={steps // 3}"]


def _beginnings(cache: Path, teacher: str) -> Iterator[str]:
    """Yields beginnings of held-out documents: a text's first words, or a conversation up to its first scored token."""
    from data.cache.manifest import read_manifest
    from data.stream.shards import ShardReader
    from data.tokenizer import Tokenizer

    manifest, tokenizer = read_manifest(cache), Tokenizer(Path(teacher))
    for record in ShardReader(cache, manifest).records():
        begins = manifest.text_begins_with
        begins = begins if record.token_ids[: len(begins)].tolist() == begins else []
        scored = int(record.loss_mask.argmax())  # position t, whose label is token t + 1
        is_prompt = scored > len(begins)
        end = scored + 1 if is_prompt else len(begins) + PROMPT_TOKENS
        if record.start or end - len(begins) > MOST_PROMPT_TOKENS:
            continue
        text = tokenizer.decode(record.token_ids[len(begins) : end].tolist())
        words = text.rstrip("\N{REPLACEMENT CHARACTER}").rsplit(" ", 1)[0].rstrip()  # the last word may be incomplete
        if text := text if is_prompt else words:
            yield text


def held_out_prompts(cache: Path, teacher: str) -> tuple[str, ...]:
    """Returns the first `PROMPTS` distinct beginnings of held-out documents."""
    prompts: dict[str, None] = {}
    for text in _beginnings(cache, teacher):
        prompts[text] = None
        if len(prompts) == PROMPTS:
            break
    return tuple(prompts)


def corpus_share(manifest: "Manifest") -> str:
    """Returns a phrase about how much of the corpus is in the training cache, and how to take more."""
    corpus_positions = max(manifest.positions, int(manifest.made.get("drawn_from", 0)))
    if corpus_positions == manifest.positions:
        return "; all of the corpus"
    return (
        f"; {manifest.positions / corpus_positions:.1%} of the corpus's {corpus_positions} training positions. "
        "To take more: --export_config=train_tokens=NUMBER, or none for all, with another --folder and --run_dir"
    )
