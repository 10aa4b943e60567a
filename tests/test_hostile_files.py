"""Files that somebody else has written, one for each place that reads them: none runs code, fills memory or disk, or
ends in anything but one message. `docs/untrusted_files.md` lists the places.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import numpy as np
import pytest
import torch
import zstandard
from fiddle.experimental import serialization
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import save as dcp_save

from data.corpus.chat.chat_template import ChatTemplate
from data.corpus.chat.conversations import Conversation
from data.corpus.corpus import Corpus
from data.importers.formats.distillkit_codec import read_codec
from data.importers.formats.formats import read_lines_of
from data.importers.settings import ImportSettings, source_files
from data.teacher.transformers_scorer import HuggingFaceScorer
from data.tokenizer import Tokenizer
from experiments.base.sweep_definition import Sweep, seeds
from experiments.config import config_items
from experiments.config.frozen_records import load_record, recorded_student
from experiments.config.sweep_points import resolve_points
from experiments.half_depth import quickstart
from kd_core.errors import UsageError
from kd_core.files import json_text, read_json, write_bytes, write_json, write_text
from kd_core.parallel.world import World, joined_world
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.huggingface.gguf import convert_gguf
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.students.starts.transformers_start import Transformers
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.checkpoint import CheckpointContent, Progress
from kd_core.training.checkpoints.checkpoint_state import run_state
from kd_core.training.monitoring.metric_log import MetricLog, read_metrics
from kd_core.training.optimizer import AdamW
from launchers.cli import app
from launchers.reports.runs import read_run
from launchers.reports.runs_page import html_page
from launchers.reports.text_tables import format_aligned
from launchers.sweeps import slurm
from launchers.sweeps.sweep_folder import SweepFolder
from tests.launchers.command import run
from tests.patience import patience
from tests.tiny import Tiny

MIB = 1 << 20
ESCAPES = "\x1b]0;owned\x07<script>alert(1)</script>"


class Touch:
    """An object whose pickle is a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a hostile one would make."""
    return tmp_path / "marker"


def _refused(work: Callable[[], object], match: str, seconds: float = 20.0) -> None:
    """One message, soon; it holds no line of a traceback."""
    started = time.perf_counter()
    with pytest.raises(UsageError, match=match) as found:
        work()
    assert "Traceback" not in str(found.value)
    assert time.perf_counter() - started < patience(seconds)


# Checkpoints


def _student(tiny: Tiny) -> tuple[Decoder, torch.optim.Optimizer]:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    return model, AdamW().build(model)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint, as this version writes it."""
    model, optimizer = _student(tiny)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    config = config_items.resolve_items(tiny.train_items(), "Experiment").config
    content = CheckpointContent(run_state(model, optimizer), Progress(1, 4), {}, config_items.record_json(config))
    return checkpoint.write(tmp_path / "checkpoints", content, World(), None)


def _rehash(folder: Path) -> None:
    """Make the hashes those of the files, as somebody who changes a file does."""
    paths = [path for path in folder.iterdir() if path.name != checkpoint.HASHES]
    facts = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths}
    write_json(folder / checkpoint.HASHES, facts)


def test_no_pickle_of_a_checkpoint_is_read(tiny: Tiny, folder: Path, marker: Path) -> None:
    hostile = pickle.dumps(Touch(marker))
    pickle.loads(hostile)  # noqa: S301
    assert marker.exists()  # it is one
    marker.unlink()
    model, optimizer = _student(tiny)
    for name in (".metadata", "__0_0.distcp", "tensors_00001.distcp"):
        (folder / name).write_bytes(hostile)
    _rehash(folder)
    assert checkpoint.newest_undamaged(folder.parent, World()) == folder
    checkpoint.load(folder, model, optimizer)
    (folder / "tensors_00000.safetensors").write_bytes(hostile)
    _rehash(folder)
    _refused(lambda: checkpoint.load_model(folder, model), r"tensors_00000\.safetensors: damaged")
    assert not marker.exists()


def test_a_command_says_one_thing_of_a_hostile_checkpoint(tiny: Tiny, folder: Path, marker: Path) -> None:
    hostile = _hostile_records(marker, (folder / "config.json").read_text())["one that a module of ours imports"]
    (folder / "config.json").write_text(hostile)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(marker)))
    _rehash(folder)
    done = run("launchers.evaluate", f"--student={folder}", f"--cache={tiny.validation}")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "which no experiment is made of" in done.stderr
    assert not marker.exists()


def test_a_checkpoint_of_the_earlier_format_is_named(tiny: Tiny, folder: Path, marker: Path) -> None:
    model, _ = _student(tiny)
    (folder / "tensors_00000.safetensors").unlink()
    dcp_save({"model.norm.weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(marker)))
    _rehash(folder)
    _refused(lambda: checkpoint.load_model(folder, model), r"\.metadata, a pickle of an earlier version")
    assert not marker.exists()


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the JSON of a safetensors header, and leave the numbers behind it as they are."""

    def hostile(folder: Path) -> None:
        path = folder / "tensors_00000.safetensors"
        payload = path.read_bytes()
        end = 8 + struct.unpack("<Q", payload[:8])[0]
        header = json.loads(payload[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + payload[end:])

    return hostile


def _offsets(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def changed(header: dict[str, Any]) -> None:
        offsets = json.loads(header["__metadata__"]["offsets"])
        change(offsets)
        header["__metadata__"]["offsets"] = json.dumps(offsets)

    return _header(changed)


def _file(name: str, text: str | bytes) -> Callable[[Path], None]:
    def hostile(folder: Path) -> None:
        write_bytes(folder / name, text.encode() if isinstance(text, str) else text)

    return hostile


def _moment_of_another_shape(folder: Path) -> None:
    """One number where AdamW's kernel, which trusts shapes, would read thousands."""
    path = folder / "tensors_00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = "optimizer.embed_tokens.weight.exp_avg"
    tensors[name] = torch.zeros(1, 1)
    save_file(tensors, path, metadata)


NORM = "model.norm.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a terabyte": (_header(lambda h: h[NORM].update(shape=[1 << 40])), "damaged"),
    "a shape that overflows": (_header(lambda h: h[NORM].update(shape=[1 << 62, 1 << 62])), "damaged"),
    "a negative size": (_header(lambda h: h[NORM].update(shape=[-1])), "damaged"),
    "bytes beyond the file": (_header(lambda h: h[NORM].update(data_offsets=[0, 1 << 50])), "damaged"),
    "an offset far away": (_offsets(lambda o: o.update({NORM: [1 << 40]})), "leave a gap"),
    "a negative offset": (_offsets(lambda o: o.update({NORM: [-1]})), "damaged"),
    "an offset of words": (_offsets(lambda o: o.update({NORM: ["0"]})), "damaged"),
    "too many offsets": (_offsets(lambda o: o.update({NORM: [0, 0]})), "damaged"),
    "no offsets": (_header(lambda h: h.pop("__metadata__")), "damaged"),
    "deep offsets": (_header(lambda h: h["__metadata__"].update(offsets="[" * 100_000)), "damaged"),
    "a header of a terabyte": (_file("tensors_00000.safetensors", struct.pack("<Q", 1 << 40) + b"{}"), "damaged"),
    "the same part twice": (
        lambda folder: write_bytes(
            folder / "tensors_00001.safetensors", (folder / "tensors_00000.safetensors").read_bytes()
        ),
        "overlap",
    ),
    "a moment of another shape": (_moment_of_another_shape, "wanted {'step'"),
    "progress of words": (_file("progress.json", '{"step": "1", "rows": 1, "skipped": 0, "metric": null}'), "progress"),
    "progress with more": (_file("progress.json", '{"step": 1, "rows": 1, "skipped": 0, "x": 0, "metric": 1}'), "x"),
    "progress of a thousand digits": (_file("progress.json", f'{{"step": {"9" * 5000}}}'), "not valid JSON"),
    "norms of words": (_file("frozen.json", '{"a": "b"}'), "norms"),
}  # fmt: skip


@pytest.mark.parametrize("which", CHECKPOINTS)
def test_a_checkpoint_that_was_changed_is_one_message(tiny: Tiny, folder: Path, which: str) -> None:
    change, match = CHECKPOINTS[which]
    change(folder)
    _rehash(folder)
    model, optimizer = _student(tiny)
    assert checkpoint.find_damage(folder) == []  # hashes are no help
    _refused(lambda: checkpoint.load(folder, model, optimizer), match)


def test_hashes_of_a_checkpoint_name_its_own_files_alone(folder: Path) -> None:
    facts = {"bytes": 1, "sha256": "0" * 64}
    for hostile in ({"../../etc/passwd": facts}, {"progress.json": 3}, {"progress.json": {"bytes": -1, "sha256": ""}}):
        write_json(folder / checkpoint.HASHES, hostile)
        assert "damaged" in checkpoint.find_damage(folder)[0]


# Run records


def _calls(module: str, name: str, *values: Any, record: str) -> str:
    """A record whose student is built by a call of something else."""
    value = json.loads(record)
    root = value["objects"][value["root"]["key"]]
    for path, each in root["items"]:
        if "student" in path:
            value["objects"][each["key"]] = json.loads(_call_json(module, name, *values))
    return json.dumps(value)


def _call_json(module: str, name: str, *values: Any) -> str:
    """A list that is made by calling `name`: what Fiddle does for named tuples."""
    pyref = {"type": "pyref", "module": module, "name": name}
    named = {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"}
    items = [[f"Attr(name='{i}')", {"type": "leaf", "value": value, "paths": []}] for i, value in enumerate(values)]
    return json.dumps({"type": named, "items": items, "metadata": pyref})


def _fiddle_config(made: Any, **arguments: Any) -> str:
    return serialization.dump_json(fdl.Config(made, **arguments))


def _hostile_records(marker: Path, record: str) -> dict[str, str]:
    touch = ["touch", str(marker)]
    return {
        "a library's function": _fiddle_config(subprocess.run, args=touch),
        "one that a module of ours imports": _fiddle_config(subprocess.run, args=touch).replace(
            '"subprocess"', '"kd_core.training.run_folder"'
        ).replace('"name": "run"', '"name": "subprocess.run"'),
        "one that ours imports by name": _fiddle_config(shutil.copyfile, src="/etc/hostname", dst=str(marker)).replace(
            '"shutil"', '"kd_core.files"'
        ).replace('"name": "copyfile"', '"name": "shutil.copyfile"'),
        "a function of ours that writes": _fiddle_config(write_text, path=str(marker), text="x"),
        "a function of ours that deletes": _fiddle_config(checkpoint.delete, folder=str(marker)),
        "a call while it is loaded": _calls("kd_core.files", "sync_folder", "/", record=record),
        "a call of a dataclass while it is loaded": _calls(
            "kd_core.training.checkpoints.checkpoint", "Checkpoint", 1, record=record
        ),
        "no experiment": _fiddle_config(Corpus, path="x"),
        "another student": record.replace('"Pretrained"', '"Random"'),
        "a number of a thousand digits": record.replace('"value": 0.9', f'"value": {"9" * 1000}'),
        "deep": '{"root": ' + "[" * 100_000,
        "not JSON": "\x00\x01",
        "nothing": "{}",
    }  # fmt: skip


def test_a_record_names_parts_of_experiments_alone(tiny: Tiny, marker: Path, tmp_path: Path) -> None:
    record = config_items.record_json(config_items.resolve_items(tiny.train_items(), "Experiment").config)
    path = tmp_path / "config.json"
    path.write_text(record)
    assert recorded_student(path).folder == str(tiny.teacher)
    for which, hostile in _hostile_records(marker, record).items():
        assert hostile != record, which
        path.write_text(hostile)
        _refused(lambda: recorded_student(path), r"config\.json|student")
    assert not marker.exists()
    hostile = _hostile_records(marker, record)["one that a module of ours imports"]
    fdl.build(serialization.load_json(hostile))  # what is kept out does run
    assert marker.exists()


def test_a_record_that_unfolds_without_end_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    record = config_items.record_json(config_items.resolve_items(tiny.train_items(), "Experiment").config)
    for last in (0, 60):  # by halves, for ever; and in a circle
        value = json.loads(record)
        kind = {"type": "pyref", "module": "builtins", "name": "tuple"}
        for level in range(61):
            inner: Any = {"type": "ref", "key": f"t{level - 1 if level else last}"}
            if level == 0 and last == 0:
                inner = {"type": "leaf", "value": 1, "paths": []}
            items = [["Index(index=0)", inner], ["Index(index=1)", inner]]
            value["objects"][f"t{level}"] = {"type": kind, "items": items, "metadata": None}
        value["objects"][value["root"]["key"]]["items"][0][1] = {"type": "ref", "key": "t60"}
        (tmp_path / "config.json").write_text(json.dumps(value))
        _refused(lambda: load_record(tmp_path / "config.json"), "unfolds to more", 5)


# Hugging Face folders


def _copied(tiny: Tiny, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for path in tiny.teacher.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_json(folder / "config.json", {**read_json(tiny.teacher / "config.json", "config"), **changes})
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "less vocabulary": {"vocab_size": 1 << 23},
    "hidden": {"hidden_size": 1 << 19},
    "words": {"hidden_size": "many"},
    "a list": {"num_attention_heads": [1]},
    "no heads": {"num_attention_heads": 0},
    "negative": {"intermediate_size": -1},
    "odd heads": {"head_dim": 3},
    "keys": {"num_key_value_heads": 3},
    "family": {"model_type": ["llama"]},
    "rope": {"rope_scaling": {"rope_type": "yarn", "factor": -1.0, "beta_fast": "x"}},
    "theta": {"rope_theta": -1.0},
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_configuration_is_bounded_by_the_weights_beside_it(tiny: Tiny, tmp_path: Path, which: str) -> None:
    folder = _copied(tiny, tmp_path / "student", **CONFIGS[which])
    _refused(lambda: build_student(Pretrained(str(folder)), torch.device("cpu"), 0), ".")


def test_weights_are_those_of_the_folder_and_no_pickle(tiny: Tiny, tmp_path: Path, marker: Path) -> None:
    folder = _copied(tiny, tmp_path / "student")
    hostile = pickle.dumps(Touch(marker))
    load = lambda: build_student(Pretrained(str(folder)), torch.device("cpu"), 0)  # noqa: E731
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt"):
        (folder / name).write_bytes(hostile)
    load()
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    kept = single.read_bytes()
    single.unlink()  # beside it no index is read
    for names in ({"a": "../../x.safetensors"}, {"a": "pytorch_model.bin"}, {"a": 3}, ["x"], {"a": "/dev/zero"}):
        write_json(index, {"weight_map": names})
        _refused(load, "index.json: damaged")
    single.write_bytes(kept)
    load()
    index.unlink()
    single.write_bytes(struct.pack("<Q", 1 << 40) + hostile)
    _refused(load, r"model\.safetensors|weights")
    single.unlink()
    single.symlink_to("/dev/zero")
    _refused(load, r"model\.safetensors: no such file")
    assert not marker.exists()


def test_transformers_runs_nothing_of_a_folder(tiny: Tiny, tmp_path: Path, marker: Path) -> None:
    code = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    hostile: dict[str, dict[str, Any]] = {
        "code": code,
        "kernels": {"attn_implementation": "somebody/kernels"},
        "layers": {"num_hidden_layers": 10**9},
        "vocabulary": {"vocab_size": 1 << 23},
        "numbers": {"hidden_size": 1 << 60},
        "words": {"hidden_size": "many"},
    }
    for which, changes in hostile.items():
        folder = _copied(tiny, tmp_path / which, **changes)
        (folder / "own.py").write_text(f"import os\nos.system('touch {marker}')\n")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
        _refused(lambda folder=folder: HuggingFaceScorer.load(folder, torch.float32, torch.device("cpu")), which)
        _refused(lambda folder=folder: Transformers(str(folder)).build_on_meta(), which)
    assert not marker.exists()


def _tokenizer(tiny: Tiny, change: Callable[[dict[str, Any]], None]) -> str:
    value = json.loads((tiny.teacher / "tokenizer.json").read_text())
    change(value)
    return json.dumps(value)


def test_a_tokenizer_is_bounded(tiny: Tiny, tmp_path: Path) -> None:
    much = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    path = tmp_path / "tokenizer.json"
    texts = [
        "\x00garbage",
        "[" * 1_000_000,
        _tokenizer(tiny, lambda t: t["model"]["vocab"].update(zzz=(1 << 32) - 2)),
        _tokenizer(tiny, lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [much] * 40})),
        _tokenizer(tiny, lambda t: t.update(normalizer={**much, "content": "b" * 100_000})),
    ]
    for text in texts:
        path.write_text(text)
        _refused(lambda: Tokenizer(tmp_path), "not a tokenizer")
    os.truncate(path, 1 << 40)
    _refused(lambda: Tokenizer(tmp_path), "at most")


CONVERSATION = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a'|center(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ 10**(10**10) }}",
    "{{ messages|tojson(indent=10**10) }}",
    "{% set x = namespace(v='ab') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")
def test_a_template_neither_leaves_its_sandbox_nor_its_bounds(
    marker: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr("data.corpus.chat.chat_template.MAX_RENDER_SECONDS", 1.0)
    hostile = source.replace("MARKER", str(marker))
    _refused(lambda: ChatTemplate(hostile, {}, [], "template").render(CONVERSATION, "doc"), "template", 15)
    assert not marker.exists()


def _gguf(tensors: int = 0, fields: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


KEY = struct.pack("<Q", 1) + b"k"
GGUFS = {
    "tensors": _gguf(tensors=1 << 60),
    "fields": _gguf(fields=1 << 60),
    "a name": _gguf(fields=1, rest=struct.pack("<Q", 1 << 60)),
    "a text": _gguf(fields=1, rest=KEY + struct.pack("<IQ", 8, 1 << 60)),
    "an array": _gguf(fields=1, rest=KEY + struct.pack("<IIQ", 9, 0, 1 << 60)),
    "an array of arrays": _gguf(fields=1, rest=KEY + struct.pack("<IIQ", 9, 9, 1)),
    "a kind": _gguf(fields=1, rest=KEY + struct.pack("<I", 99)),
    "a tensor far away": _gguf(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 0, 1 << 60)),
    "two fields": _gguf(fields=2, rest=(KEY + struct.pack("<IB", 0, 1)) * 2),
    "two tensors": _gguf(tensors=2, rest=(KEY + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2 + bytes(64)),
    "nothing": b"",
    "little": _gguf(),
}


@pytest.mark.parametrize("which", GGUFS)
def test_a_gguf_has_what_it_counts(tmp_path: Path, which: str) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFS[which])
    _refused(lambda: convert_gguf(path, tmp_path), r"model\.gguf: damaged", 5)


# Corpora


def _rows(path: Path) -> int:
    return sum(1 for _ in Corpus(str(path)).documents())


def test_corpora_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.text_lines.MAX_LINE_BYTES", MIB)
    monkeypatch.setattr("data.text_lines.MAX_UNPACKED_BYTES", 2 * MIB)
    monkeypatch.setattr("data.corpus.file_rows.MAX_DOCUMENT_BYTES", MIB)
    row = b'{"text": "' + b"a" * 1000 + b'"}\n'
    hostile: dict[str, tuple[bytes, str]] = {
        "bomb.jsonl.gz": (gzip.compress(b'{"text": "' + bytes(64 * MIB)), "a line of more than"),
        "rows.jsonl.gz": (gzip.compress(row * 20_000), "times as much"),
        "bomb.jsonl.zst": (zstandard.compress(b'{"text": "' + bytes(64 * MIB)), "a line of more than"),
        "rows.jsonl.zst": (zstandard.compress(row * 20_000), "times as much"),
        "rows.json.zst": (zstandard.compress(b"[" + b'{"text": "a"},' * 400_000), "times as much"),
        "deep.json": (b"[" * 200_000, "not JSON"),
        "cut.jsonl.zst": (zstandard.compress(row * 9)[:-9], "damaged zstd"),
        "quotes.csv": (b'text\n"' + bytes(MIB // 2), "not CSV"),
        "no.arrow": (b"ARROW1" + bytes(100), "not Arrow"),
        "other.arrow": (bytes(100), "not Arrow"),
        "line.jsonl": (bytes(2 * MIB), "a line of more than"),
        "deep.jsonl": (b'{"text": ' + b"[" * 200_000, "not JSON"),
        "digits.jsonl": (b'{"text": ' + b"9" * 9000 + b"}", "not JSON"),
        "long.txt": (bytes(2 * MIB), "Split it"),
        "cut.jsonl.gz": (gzip.compress(row * 9)[:-9], "damaged gzip"),
        "no.parquet": (b"PAR1" + bytes(100) + b"PAR1", "not Parquet"),
    }
    for name, (payload, match) in hostile.items():
        (tmp_path / name).write_bytes(payload)
        _refused(lambda name=name: _rows(tmp_path / name), match)
    others = tmp_path / "others"
    others.mkdir()
    os.mkfifo(others / "pipe.txt")
    (others / "zero.txt").symlink_to("/dev/zero")
    _refused(lambda: _rows(others), "has no .txt")


def test_a_parquet_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("data.text_lines.MAX_UNPACKED_BYTES", 16 * MIB)
    text = pa.array(["a" * MIB]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), text.dictionary)
    parquet.write_table(pa.table({"text": column}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < MIB
    _refused(lambda: _rows(tmp_path / "bomb.parquet"), "times as much|not Parquet", 60)


def test_an_arrow_file_is_checked_before_its_offsets_are_trusted(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": ["x" * 10] * 3})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    payload, offsets = (tmp_path / "a.arrow").read_bytes(), struct.pack("<4i", 0, 10, 20, 30)
    assert offsets in payload
    (tmp_path / "a.arrow").write_bytes(payload.replace(offsets, struct.pack("<4i", 0, 10, 20, 1 << 30)))
    _refused(lambda: _rows(tmp_path / "a.arrow"), "not Arrow, or damaged")


def test_other_systems_caches_are_bounded(tmp_path: Path) -> None:
    line = {"tokens": [1, 2, 3], "top_ids": [[1], [2]], "top_log_probs": [[-0.1], [-0.1]]}
    job = ImportSettings("jsonl", str(tmp_path / "a.jsonl"), 320, "unknown")
    for change in (
        {"tokens": [10**30, 1, 1]},
        {"top_ids": [[1], [list(range(9))]]},
        {"top_log_probs": [["x"], [1]]},
        {"top_log_probs": [[10**400], [0]]},
        {"top_ids": 3},
        {"tokens": [1] * 600_001, "top_ids": [[*range(99)], *[[]] * 599_999],
         "top_log_probs": [[-9] * 99, *[[]] * 599_999]},
    ):  # fmt: skip
        (tmp_path / "a.jsonl").write_text(json.dumps({**line, **change}))
        _refused(
            lambda: list(read_lines_of(job)),
            r"a\.jsonl:1",
        )
    (tmp_path / "a.jsonl").write_text("[" * 200_000)
    _refused(lambda: list(read_lines_of(job)), r"a\.jsonl:1")
    (tmp_path / "c_999999999999.jsonl").write_text("")
    _refused(lambda: source_files(str(tmp_path / "c_CHUNK_ID.jsonl"), (".jsonl",)), "no such chunk", 2)


def _megatron_tar(folder: Path, payload: bytes, name: str = "0-8.pt.zst", meta: bytes = b"{}") -> ImportSettings:
    """A tar as Megatron-LM names it, with one member behind its metadata, and the job that converts it."""
    with tarfile.open(folder / "dp0__0-8.tar", "w") as tar:
        for member, data in (("_meta.json", meta), (name, payload)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    np.save(folder / "tokens.npy", np.zeros((8, 9), np.int64))
    return ImportSettings("megatron", str(folder), 320, "unknown", tokens=str(folder / "tokens.npy"))


def test_no_pickle_of_megatrons_tars_is_run(tmp_path: Path) -> None:
    """Members are pickles, read by an unpickler that knows tensors alone, and are bounded before they are unpacked."""
    sizes = json.dumps({"saver": {"dp_size_save": 1, "mbs_save": 8}}).encode()
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(touched),)

    buffer = io.BytesIO()
    torch.save({"values": Evil(), "indices_low": Evil(), "bit_17": 1}, buffer)
    shape = (8, 8, 2**40)
    repeated = io.BytesIO()
    torch.save({"values": torch.zeros(1).expand(shape), "indices_low": torch.zeros(1), "bit_17": 1}, repeated)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    for payload, message in {
        zstandard.compress(buffer.getvalue()): "holds something else than a dict of tensors",
        zstandard.compress(repeated.getvalue()): "of 4 stored bytes",
        zstandard.compress(pickle.dumps(Evil())): "pickle protocol",
        zstandard.compress(b"PK\x03\x04" + bytes(100)): "a member of Megatron-LM's tars",
        bomb: "declare 268435456 unpacked ones",
        b"\x28\xb5\x2f\xfd" + bytes(8): "a member of Megatron-LM's tars",
        b"no frame": "a member of Megatron-LM's tars",
    }.items():
        job = _megatron_tar(tmp_path, payload, meta=sizes)
        _refused(lambda job=job: list(read_lines_of(job)), message)
    assert not touched.exists()
    for name, meta, message in (
        ("../0.pt.zst", sizes, "is no member that Megatron-LM writes"),
        ("0-8.pt.zst", b"[]", "_meta.json"),
        ("0-8.pt.zst", b"{}", "lacks dp_size_save"),
        ("0-8.pt.zst", json.dumps({"saver": {"dp_size_save": 10**9}}).encode(), "dp_size_save"),
    ):
        job = _megatron_tar(tmp_path, b"", name, meta)
        _refused(lambda job=job: list(read_lines_of(job)), message)
    (tmp_path / "dp0__0-8.tar").write_bytes(b"no tar" * 200)
    _refused(lambda: list(read_lines_of(job)), "not a tar, or damaged")
    job = _megatron_tar(tmp_path, b"", meta=sizes)
    np.save(tmp_path / "tokens.npy", np.array([Evil()], object), allow_pickle=True)
    _refused(lambda: list(read_lines_of(job)), "--tokens")
    assert not touched.exists()


def test_a_configuration_of_distillkits_codec_is_bounded(tmp_path: Path) -> None:
    for text in (
        "!!python/object/apply:os.system [id]",
        "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]",
        "{d: 5, k: 99999999, exact_k: 1, polynomial_terms: [0]}",
        "{d: 5, k: 9, exact_k: 1, polynomial_terms: [99]}",
        "x" * 100_000,
        "[" * 50_000,
    ):
        (tmp_path / "a.yaml").write_text(text)
        _refused(lambda: read_codec(tmp_path / "a.yaml"), r"a\.yaml")


# Runs, sweeps, tables


def _run(folder: Path, lines: str = "") -> Path:
    (folder / "attempts" / "001").mkdir(parents=True)
    (folder / "config.txt").write_text(f"steps = 3  # x\ntokens_per_step = 4  # x\nnote = {ESCAPES}  # {ESCAPES}\n")
    facts = {"started": ESCAPES, "python": "3", "commit": ESCAPES, "versions": {ESCAPES: ESCAPES}, "world": {},
             "inputs": {ESCAPES: {"path": ESCAPES, "sha256": ESCAPES}}}  # fmt: skip
    write_json(folder / "attempts" / "001" / "attempt.json", facts)
    number = {"step": 1, f"val/{ESCAPES}": 1e308, "val/loss": -1e308, "train/loss": float("nan")}
    (folder / "metrics.jsonl").write_text(lines or json.dumps(number) + "\n" + json.dumps({**number, "step": 2}) + "\n")
    return folder


def test_what_others_named_is_escaped_in_tables_pages_and_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [read_run(_run(tmp_path / name)) for name in ("one", "two")]
    text = html_page(runs, everything=True, by_tokens=True)
    assert "\x1b" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in format_aligned(["a"], [[ESCAPES]])
    with pytest.raises(SystemExit) as exit_info, app.guard("test"):
        raise UsageError(f"a file: holds {ESCAPES}{'x' * 100_000}.")
    assert exit_info.value.code == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert len(said) < 50_000


def test_numbers_of_a_run_are_numbers(tmp_path: Path) -> None:
    for number, line in enumerate(
        ("3", '{"val/loss": 1}', '{"step": 1, "a": "b"}', '{"step": 1e3}', '{"step": 1, "a": ' + "9" * 400 + "}",
         "[" * 200_000, '{"step": 1, "histograms": {"a": {"min": 0}}}', '{"step": 1, "continuations": [1]}')
    ):  # fmt: skip
        folder = _run(tmp_path / str(number), line + "\n")
        _refused(lambda folder=folder: read_run(folder), r"metrics\.jsonl:1|wanted a step")
    folder = _run(tmp_path / "facts")
    for facts in ({}, {"started": 1}, {"versions": [1]}):
        write_json(folder / "attempts" / "001" / "attempt.json", facts)
        _refused(lambda: read_run(folder), r"attempt\.json: damaged")
    (folder / "config.txt").write_text("steps = many  # x\n")
    _refused(lambda: read_run(folder), "steps")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "run"
    target.write_text("mine")
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to(target)
    (folder / "a.json.partial").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        write_text(folder / "a.json", "theirs")
    log = MetricLog(folder, None)
    log.add(1, {"a": 1.0})
    log.__exit__()
    assert target.read_text() == "mine"
    assert read_metrics(folder / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_a_sweeps_folder_is_read_strictly(tiny: Tiny, tmp_path: Path, marker: Path) -> None:
    items = tiny.train_items()[1:]
    points = resolve_points(Sweep(quickstart) * seeds(1), items, "study")
    folder, (point,) = SweepFolder(tmp_path / "sweep"), points
    folder.config(point.id).parent.mkdir(parents=True)
    folder.config(point.id).write_text(_fiddle_config(subprocess.run, args=["touch", str(marker)]))
    folder.claim("study", points)
    assert folder.config(point.id).read_text() == point.record  # not what somebody had put there
    for status in ({}, {"state": "odd"}, {**vars(folder.status(point.id)), "job": "1; touch x"}, {"starts": "x"}):
        write_json(tmp_path / "sweep" / "status" / f"{point.id}.json", status)
        _refused(lambda: folder.status(point.id), "status")
    for record in ({}, {"sweep": 3}, {"sweep": "study", "points": [3]}, {"sweep": "study", "points": [{"id": "../x"}]}):
        write_text(tmp_path / "sweep" / "sweep.json", json_text(record))
        _refused(lambda: folder.claim("study", points), "sweep")


def test_jobs_are_unpickled_from_a_folder_that_nobody_could_prepare(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    (tmp_path / "sweep" / "slurm").mkdir(parents=True)
    (tmp_path / "sweep" / "slurm" / "7_0_submitted.pkl").write_bytes(pickle.dumps(Touch(tmp_path / "marker")))
    jobs = slurm._jobs_folder(folder)
    assert list(jobs.iterdir()) == []
    assert jobs.stat().st_mode & 0o077 == 0
    assert slurm._jobs_folder(folder) != jobs
    (tmp_path / "sweep").chmod(0o777)
    _refused(lambda: slurm._jobs_folder(folder), "others cannot write")


# Plans of exports, the environment


@pytest.mark.parametrize(
    "plan", [{"dtype": []}, {"dtype": "float16"}, {}, {"dtype": "float32", "batch_rows": 0}, {"batch_rows": "2"}]
)
def test_the_plan_of_an_export_is_read_strictly(tiny: Tiny, tmp_path: Path, plan: dict[str, Any]) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    write_json(tmp_path / "out" / "train" / "plan.json", plan)
    items = ["quickstart_export", f"teacher={tiny.teacher}", f"corpus.path={tiny.corpus}"]
    done = run("launchers.export_teacher", *(f"--config={item}" for item in items), f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert any(name in done.stderr for name in ("dtype", "precision", "batch_rows"))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1e9", "1" * 5000, "__import__('os')"])
def test_the_environment_of_torchrun_holds_numbers(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name}: got .* in the environment; wanted a number"), joined_world():
        pass
