"""Other systems' caches: what they say comes back, what they do not say is refused or stated, bad lines are named."""

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from data.cache.inspection.verify import verify
from data.cache.manifest import read_manifest
from data.cache.record import UNUSED, Record
from data.importers.formats.formats import read_lines_of
from data.importers.import_cache import import_cache
from data.importers.settings import UNKNOWN, ImportSettings, source_files
from data.stream.source import Shards
from data.tokenizer import Tokenizer
from experiments.base.parts import cache_facts
from kd_core.errors import UsageError
from kd_core.losses.objective import Distillation, Objective
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.monitoring.metric_log import read_metrics
from tests.launchers.command import configs, run
from tests.tiny import Tiny

K = 6


def _logits(tiny: Tiny, record: Record) -> torch.Tensor:
    teacher = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    T = record.positions
    tokens = torch.from_numpy(record.token_ids[:-1].astype(np.int64))[None]
    with torch.no_grad():
        return teacher(tokens, torch.arange(T)[None], torch.zeros(1, T, dtype=torch.int64))[0]


def _nemo(tiny: Tiny, record: Record, sums: bool) -> dict[str, Any]:
    logits = _logits(tiny, record)
    best = logits.topk(K)
    line = {
        "tokens": record.token_ids[:-1].tolist(),
        "labels": record.token_ids[1:].tolist(),
        "loss_mask": [0.0] + [1.0] * (record.positions - 1),
        "topk_logits": best.values.tolist(),
        "topk_token_ids": best.indices.tolist(),
        "index": 3,
    }
    return {**line, "log_sum_exp_logits": logits.logsumexp(1).tolist()} if sums else line


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _job(tiny: Tiny, kind: str, source: Path | str, **settings: Any) -> ImportSettings:
    size, known = read_manifest(tiny.train).vocab_size, settings.pop("tokenizer_known", True)
    tokenizer = Tokenizer(tiny.teacher).fingerprint() if known else UNKNOWN
    return ImportSettings(
        kind, str(source), size, tokenizer, **{"codec": "lossless", "block_positions": 64, **settings}
    )


def test_nemo_aligners_chunks_come_back_as_true_log_probabilities(tiny: Tiny, tmp_path: Path) -> None:
    records = tiny.records()[:6]
    for chunk in range(2):
        _write(tmp_path / f"train_{chunk}.jsonl", [_nemo(tiny, r, True) for r in records[3 * chunk : 3 * chunk + 3]])
    manifest = import_cache(_job(tiny, "nemo_aligner", tmp_path / "train_CHUNK_ID.jsonl"), tmp_path / "cache")
    assert manifest.selection.top_k == K
    assert manifest.unknown in ((), ("label_log_prob",))
    for found, record in zip(tiny.records(tmp_path / "cache"), records, strict=True):
        truth = torch.log_softmax(_logits(tiny, record).double(), dim=1)
        assert found.token_ids.tolist() == record.token_ids.tolist()
        assert found.loss_mask.tolist() == [0] + [1] * (record.positions - 1)
        own = truth.gather(1, torch.from_numpy(found.topk_token_ids.astype(np.int64))).numpy()
        assert np.abs(own - found.topk_log_probs).max() < 1e-4
        rest = 1 - truth.topk(K).values.exp().sum(1).numpy()
        assert np.abs(np.exp(found.tail_log_prob) - rest).max() < 1e-4
    assert not verify(tmp_path / "cache", lambda _: None).problems
    Shards(str(tmp_path / "cache")).check(manifest.vocab_size, manifest.tokenizer)


def test_without_the_normaliser_the_tail_is_unknown_and_losses_that_need_it_refuse(tiny: Tiny, tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", [_nemo(tiny, record, False) for record in tiny.records()[:6]])
    manifest = import_cache(_job(tiny, "nemo_aligner", source), tmp_path / "cache")
    assert "tail" in manifest.unknown
    facts = cache_facts(Shards(str(tmp_path / "cache")))
    Objective({"kd": Distillation(tail="renormalized")}).check_cache(facts)
    with pytest.raises(UsageError, match="did not say what mass its entries have"):
        Objective({"kd": Distillation()}).check_cache(facts)


def test_a_servers_top_log_probabilities_of_any_length(tiny: Tiny, tmp_path: Path) -> None:
    lines = []
    for record in tiny.records()[:4]:
        order = np.argsort(-record.topk_log_probs, axis=1)
        keep = [1 + t % 5 for t in range(record.positions)]
        lines.append(
            {
                "tokens": record.token_ids.tolist(),
                "top_ids": [record.topk_token_ids[t, order[t, :k]].tolist() for t, k in enumerate(keep)],
                "top_log_probs": [record.topk_log_probs[t, order[t, :k]].tolist() for t, k in enumerate(keep)],
                "label_log_probs": record.label_log_prob.tolist(),
            }
        )
    job = _job(tiny, "jsonl", _write(tmp_path / "a.jsonl", lines), tokenizer_known=False)
    manifest = import_cache(job, tmp_path / "cache")
    assert manifest.unknown == ("tokenizer",)
    for found, record in zip(tiny.records(tmp_path / "cache"), tiny.records(), strict=False):
        assert (found.topk_log_probs > UNUSED).sum(axis=1).tolist() == [1 + t % 5 for t in range(record.positions)]
        assert np.abs(found.label_log_prob - record.label_log_prob).max() < 1e-5
    Shards(str(tmp_path / "cache")).check(manifest.vocab_size, "any")


def test_entries_of_a_servers_padding_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    """Of 320 columns, 305 are tokens: the other entries are divided by the mass that padding leaves."""
    line = {
        "tokens": [3, 4, 5],
        "top_ids": [[4, 310], [5, 9]],
        "top_log_probs": [np.log([0.6, 0.008]).tolist(), [-0.2, -3]],
    }
    manifest = import_cache(
        _job(tiny, "jsonl", _write(tmp_path / "a.jsonl", [line] * 8), columns=320), tmp_path / "cache"
    )
    assert manifest.vocab_size == 305
    for record in tiny.records(tmp_path / "cache"):
        pairs = zip(record.topk_token_ids.tolist(), record.topk_log_probs.tolist(), strict=True)
        entries = [{i: log for i, log in zip(*pair, strict=True) if log > UNUSED} for pair in pairs]
        assert np.exp(entries[0][4]) == pytest.approx(0.6 / 0.992, rel=1e-5)
        assert np.exp(record.tail_log_prob[0]) == pytest.approx(0.392 / 0.992, rel=1e-5)
        assert (entries[1][5], entries[1][9]) == pytest.approx((-0.2, -3))
        assert [sorted(each) for each in entries] == [[4], [5, 9]]


def test_a_token_beyond_the_tokenizer_is_named(tiny: Tiny, tmp_path: Path) -> None:
    line = {"tokens": [3, 310, 5], "top_ids": [[4], [5]], "top_log_probs": [[-0.2], [-0.2]]}
    with pytest.raises(UsageError, match=r"a.jsonl:1: token 310"):
        import_cache(_job(tiny, "jsonl", _write(tmp_path / "a.jsonl", [line]), columns=320), tmp_path / "cache")


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "labels not shifted": (lambda v: v.update(labels=v["tokens"]), "position 1: the label is"),
    "an id outside": (lambda v: v["topk_token_ids"][2].__setitem__(0, 10**6), r"the vocabulary has"),
    "a row short": (lambda v: v["topk_logits"].pop(), "rows of ids"),
    "an entry twice": (lambda v: v["topk_token_ids"].__setitem__(0, [5] * K), "an id twice"),
    "too much mass": (lambda v: v.update(log_sum_exp_logits=[0.0] * len(v["tokens"])), "wanted probabilities"),
    "no field": (lambda v: v.pop("topk_logits"), "no field 'topk_logits'"),
    "a mask of halves": (lambda v: v.update(loss_mask=[0.5] * len(v["tokens"])), "each 0 or 1"),
    "no finite sum": (lambda v: v["log_sum_exp_logits"].__setitem__(0, float("inf")), "log_sum_exp_logits: "),
    "sums of lists": (lambda v: v.update(log_sum_exp_logits=[[1.0]] * len(v["tokens"])), "log_sum_exp_logits: "),
    "words": (lambda v: v.update(tokens="abc"), "wanted a list of token ids"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_and_nothing_is_left(tiny: Tiny, tmp_path: Path, bad: str) -> None:
    damage, message = BAD[bad]
    lines = [_nemo(tiny, record, True) for record in tiny.records()[:3]]
    damage(lines[1])
    source = _write(tmp_path / "a.jsonl", lines)
    with pytest.raises(UsageError, match=rf"a\.jsonl:2: .*{message}"):
        import_cache(_job(tiny, "nemo_aligner", source), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


LINE = {"tokens": [1, 2, 3], "top_ids": [[2, 5], [3]], "top_log_probs": [[-0.1, -3.0], [-0.2]]}


def _read(source: Path) -> list[str]:
    return [line.record.document for line in read_lines_of(ImportSettings("jsonl", str(source), 32, UNKNOWN))]


def test_sources_are_read_packed_with_marks_and_from_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = json.dumps(LINE).encode()
    payloads = {
        "a.jsonl": b"\xef\xbb\xbf" + line + b"\r\n\n" + line,
        "b.jsonl.gz": gzip.compress(line),
        "c.jsonl.zst": zstandard.compress(line + b"\n") + zstandard.compress(line),
        "d/e.ndjson.xz": lzma.compress(line),
        "notes.pdf": b"",
    }
    for name, payload in payloads.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(payload)
    with caplog.at_level("INFO", logger="kd"):
        assert _read(tmp_path) == [
            "a.jsonl:1", "a.jsonl:3", "b.jsonl.gz:1", "c.jsonl.zst:1", "c.jsonl.zst:2", "d/e.ndjson.xz:1",
        ]  # fmt: skip
    assert caplog.text.count("1 left out: 1 .pdf") == 1
    assert _read(tmp_path / "c.jsonl.zst") == ["c.jsonl.zst:1", "c.jsonl.zst:2"]


LABELS = "log-probabilities of the labels: wanted 2 finite numbers, none above 0"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b'{"document": "caf\xe9"}', "not UTF-8 text"),
        (b"\xff\xfe" + json.dumps(LINE).encode("utf-16-le"), "not UTF-8 text"),
        (b'{"tokens": ' + b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "holds a list, wanted a JSON object"),
        (b"null", "holds a NoneType, wanted a JSON object"),
        (json.dumps({**LINE, "tokens": None}).encode(), "tokens: wanted a list of token ids"),
        (json.dumps({**LINE, "top_ids": None}).encode(), "ids: a NoneType; wanted a list of a list"),
        (json.dumps({**LINE, "top_ids": [None, [3]]}).encode(), "position 0: its ids are None; wanted a list"),
        (json.dumps({**LINE, "top_log_probs": [[-0.1, -3.0], None]}).encode(), "position 1: its numbers are None"),
        (json.dumps({**LINE, "top_ids": [[2, None], [3]]}).encode(), "ids of position 0: wanted a list of token ids"),
        (json.dumps({**LINE, "top_log_probs": [[None, -3.0], [-0.2]]}).encode(), "an entry is not a finite number"),
        (json.dumps({**LINE, "loss_mask": None}).encode(), "loss_mask: wanted 2 numbers"),
        (json.dumps({**LINE, "tokens": [[1], [2, 3], 3]}).encode(), "tokens: wanted a list of token ids"),
        (json.dumps({**LINE, "tokens": []}).encode(), "tokens: 0; wanted at least two"),
        (json.dumps({**LINE, "label_log_probs": [None, -1]}).encode(), LABELS),
        (json.dumps({**LINE, "label_log_probs": ["a", -1]}).encode(), LABELS),
        (json.dumps({**LINE, "label_log_probs": [-1e300, -1]}).encode(), LABELS),
        (json.dumps({**LINE, "document": 1, "loss_mask": {}}).encode(), "a field is of another type than jsonl has"),
    ],
)
def test_whatever_is_in_a_line_is_one_message(tmp_path: Path, payload: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n" + payload)
    with pytest.raises(UsageError, match=rf"{tmp_path}/a\.jsonl:2: {message}"):
        _read(tmp_path / "a.jsonl")


def test_an_entry_below_the_least_float_is_not_used(tmp_path: Path) -> None:
    row = {"tokens": [1, 2], "top_ids": [[2, 5]], "top_log_probs": [[-1e300, -1.0]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    manifest = import_cache(ImportSettings("jsonl", str(tmp_path / "a.jsonl"), 32, UNKNOWN), tmp_path / "cache")
    assert math.isfinite(manifest.statistics["teacher_nll"])
    assert manifest.statistics["entries"] == 1


def test_a_number_that_no_cache_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="--vocab_size: got 5000000; a cache has at most 4194304"):
        ImportSettings("jsonl", "a.jsonl", 5_000_000, UNKNOWN)
    with pytest.raises(UsageError, match="--shard_bytes: got 0; wanted at least 1"):
        ImportSettings("jsonl", "a.jsonl", 5, UNKNOWN, shard_bytes=0)


def test_a_missing_file_of_a_flag_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "dp0__0-1.tar").touch()
    job = ImportSettings("megatron", str(tmp_path), 32, UNKNOWN, tokens="no.npy")
    with pytest.raises(UsageError, match=r"^--tokens=no\.npy: no such file"):
        import_cache(job, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress),
                                            ("a.jsonl.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress)])  # fmt: skip
def test_what_is_cut_off_is_not_taken_for_whole(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(b"".join(json.dumps({**LINE, "document": str(i)}).encode() + b"\n" for i in range(3000)))
    (tmp_path / name).write_bytes(packed[:-30])
    with pytest.raises(UsageError, match=rf"{name}: damaged"):
        _read(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match=rf"{name}: damaged"):
        _read(tmp_path / name)


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"c{number}.jsonl").write_text("")
    with pytest.raises(UsageError, match="c2.jsonl: no such chunk"):
        source_files(str(tmp_path / "cCHUNK_ID.jsonl"), (".jsonl",))
    with pytest.raises(UsageError, match="no such file"):
        source_files(str(tmp_path / "other.jsonl"), (".jsonl",))


def test_the_command_converts_and_its_cache_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_nemo(tiny, record, False) for record in tiny.records()])
    flags = ["--format=nemo_aligner", f"--source={tmp_path / 'a.jsonl'}", f"--model={tiny.teacher}"]
    done = run("launchers.convert", *flags, f"--out={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stderr
    assert "not known from the source: " in done.stderr
    items = [item for item in tiny.train_items(2) if not item.startswith("shards")]
    items += [f"shards.path={tmp_path / 'cache'}", f"evaluation.shards.path={tmp_path / 'cache'}"]
    items += ["loss.terms.kd.tail=renormalized", "checkpoint.best_metric=val/renormalized_kl"]
    done = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["val/renormalized_kl"] < lines[0]["val/renormalized_kl"]
