"""Export through a vLLM server: entries of its recorded replies against our decoder, faults and refusals."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.cache.manifest import read_manifest
from data.cache.record import Record
from data.cache.selection import Selection
from data.export.plan import make_plans
from data.export.repeatability import measure_spread
from data.stream.shards import ShardReader
from data.teacher import vllm_client
from data.teacher.choose_scorer import load_scorer, load_vllm, read_teacher_facts
from data.teacher.vllm_client import VllmServer
from data.teacher.vllm_server import VllmServerScorer, parse_reply
from data.teacher.vllm_settings import VllmSettings
from kd_core.errors import UsageError
from kd_core.files import write_json
from kd_core.parallel.world import World
from tests.data.teacher.vllm_replies import (
    CONTEXT,
    CPU,
    MOST_LOGPROBS,
    POOLING,
    ROW_LENGTH,
    TOP_K,
    Reply,
    answering,
    make_folders,
    read_replies,
    refused_export,
    replay,
    score_some_rows,
    tiny_export,
)
from tests.launchers.command import configs, run
from tests.tiny import bytes_of, write_caches

Folders = tuple[Path, Path]
UNLIKELY = {"logprob": -30.0}


def always(text: str, status: int = 200) -> Callable[[str, bytes], Reply]:
    return lambda *_: (status, text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(vllm_client, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(vllm_client.time, "sleep", lambda _: None)


def _records(folder: Path) -> list[Record]:
    return list(ShardReader(folder, read_manifest(folder)).records())


def test_recorded_entries_are_those_of_our_decoder(folders: Folders, tmp_path: Path) -> None:
    """All log-probabilities of a float64 softmax over our decoder's logits of the same tokens."""
    with answering(replay) as url:
        write_caches(tiny_export(*folders, scorer_url=url), tmp_path / "out")
    scorer = load_scorer(folders[0], "decoder", torch.float32, CPU)
    records = _records(tmp_path / "out/train")
    assert {record.positions for record in records} > {ROW_LENGTH}  # windows of mixed lengths
    for record in records:
        tokens = torch.from_numpy(record.token_ids).long()
        with torch.no_grad():
            logits = torch.cat([*scorer.logits(tokens[None, :-1], torch.zeros(1, record.positions).long())])
        log_probs = (logits.double() - logits.double().logsumexp(1, keepdim=True)).numpy()
        ids = np.argsort(-log_probs, axis=1)[:, :TOP_K]
        assert (np.sort(ids, axis=1) == np.sort(record.topk_token_ids, axis=1)).all()
        np.testing.assert_allclose(
            record.topk_log_probs, np.take_along_axis(log_probs, record.topk_token_ids.astype(int), 1), atol=2e-5
        )
        labels = log_probs[np.arange(record.positions), record.token_ids[1:]]
        np.testing.assert_allclose(record.label_log_prob, labels, atol=2e-5)
        tail = np.log(1 - np.exp(np.take_along_axis(log_probs, ids, 1)).sum(axis=1))
        np.testing.assert_allclose(record.tail_log_prob, tail, atol=1e-4)


def test_recorded_hidden_states_give_every_selection_of_our_decoder(folders: Folders) -> None:
    with answering(replay) as url:
        theirs = score_some_rows(load_vllm(folders[0], torch.float32, CPU, VllmSettings(POOLING, url)))
    ours = score_some_rows(load_scorer(folders[0], "decoder", torch.float32, CPU))
    assert (theirs.ids == ours.ids).all()
    assert (theirs.sampled_ids == ours.sampled_ids).all()
    for field in ("log_probs", "tail_log_prob", "label_log_prob", "tempered_tails", "sampled_log_weights"):
        torch.testing.assert_close(getattr(theirs, field), getattr(ours, field), atol=2e-5, rtol=0)


def test_hidden_states_of_another_size_are_refused(folders: Folders) -> None:
    def other(path: str, body: bytes) -> Reply:
        return (200, "abcd") if path == "/pooling" else replay(path, body)

    with answering(other) as url, pytest.raises(UsageError, match="got 4 bytes for 8 tokens; wanted 2048"):
        score_some_rows(load_vllm(folders[0], torch.float32, CPU, VllmSettings(POOLING, url)))


def test_plan_and_manifest_name_the_server_but_not_its_address(folders: Folders, tmp_path: Path) -> None:
    with answering(replay) as url:
        (plan, _) = make_plans(tiny_export(*folders, scorer_url=url), tmp_path / "out")
        write_caches(tiny_export(*folders, scorer_url=url), tmp_path / "out")
    assert plan.identity["scorer"] == "vllm"
    assert plan.identity["teacher"]["vllm"] == {"release": "server 0.32.0", "model": "tiny"}
    assert url not in json.dumps(plan.identity)
    assert read_manifest(plan.folder).teacher["vllm"] == plan.identity["teacher"]["vllm"]
    assert plan.teacher.max_positions == CONTEXT - 2


def test_the_probe_asks_a_server_for_no_more_entries_than_the_export(folders: Folders, tmp_path: Path) -> None:
    """A server was started for a most number of entries, which is 20 unless set."""
    with answering(replay) as url:  # which refuses what was not recorded
        (plan, _) = make_plans(tiny_export(*folders, scorer_url=url), tmp_path / "out")
        scorer = load_vllm(folders[0], torch.float32, CPU, plan.export.vllm_settings)
        assert measure_spread(plan, scorer, World()).largest == 0


def test_a_plan_without_vllm_is_as_before(folders: Folders, tmp_path: Path) -> None:
    (plan, _) = make_plans(tiny_export(*folders, scorer="decoder"), tmp_path)
    assert not {"vllm", "scorer_url"} & set(plan.identity)
    assert set(plan.identity["teacher"]) == {"weights", "config"}


def test_an_export_survives_faults_and_goes_on_after_the_servers_end(folders: Folders, tmp_path: Path) -> None:
    with answering(replay) as url:
        write_caches(tiny_export(*folders, scorer_url=url), tmp_path / "whole")
    asked, dies_at = [0], [math.inf]

    def flaky(path: str, body: bytes) -> Reply:
        asked[0] += 1
        if asked[0] > dies_at[0]:
            return 0, ""
        if path == "/v1/completions" and asked[0] % 3:  # two of three tries fail, in one way or another
            return [(503, "busy"), (0, ""), (429, "slow down")][asked[0] % 2]
        return replay(path, body)

    with answering(flaky) as url:
        write_caches(tiny_export(*folders, scorer_url=url), tmp_path / "out")
        assert bytes_of(tmp_path / "out/train") == bytes_of(tmp_path / "whole/train")
        shutil.rmtree(tmp_path / "out")
        asked[0], dies_at[0] = 0, 30
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm_client, "PATIENCE", 0.05)
            message = refused_export(*folders, url, tmp_path / "out")
        assert "no answer for" in message
        assert "goes on where it stopped" in message
        asked[0], dies_at[0] = 0, math.inf
        write_caches(tiny_export(*folders, scorer_url=url), tmp_path / "out")
    assert bytes_of(tmp_path / "out/train") == bytes_of(tmp_path / "whole/train")


def test_one_request_that_always_fails_ends_though_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "PATIENCE", 0.2)
    with answering(lambda path, _: (500, "") if path == "/bad" else (200, "1")) as url:
        server = VllmServer(url)
        monkeypatch.setattr(vllm_client.time, "sleep", lambda _: server.request_json("/good"))
        with pytest.raises(UsageError, match=r"/bad: no answer for .* seconds \(status 500\)"):
            server.request("/bad")


def test_refusals_of_the_server_name_its_flag(folders: Folders, tmp_path: Path) -> None:
    with answering(replay) as url:
        selection = Selection(MOST_LOGPROBS + 1)
        message = refused_export(*folders, url, tmp_path / "k", selection=selection)
        assert f"--max-logprobs {MOST_LOGPROBS + 1}" in message
        assert "greater than max allowed: 8" in message
        message = refused_export(*folders, url, tmp_path / "pooling", vllm=POOLING)
        assert "Start the server with --runner pooling" in message
        message = refused_export(*folders, url, tmp_path / "long", row_length=CONTEXT - 1)
        assert f"row_length: got {CONTEXT - 1}; the teacher's context is {CONTEXT - 2}" in message


def test_columns_beyond_the_tokenizer_are_logged(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    padded = shutil.copytree(folders[0], tmp_path / "padded")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 7}))
    with answering(replay) as url:
        for folder in (folders[0], padded):
            caplog.clear()
            load_vllm(folder, torch.float32, CPU, VllmSettings({}, url))
            assert ("columns for" in caplog.text) == (folder == padded)


def test_a_refused_start_leaves_no_plan_in_the_way(folders: Folders, tmp_path: Path) -> None:
    def refusing(path: str, body: bytes) -> Reply:
        message = {"error": {"message": "Requested prompt logprobs of 9, which is greater than max allowed: 8"}}
        return (400, json.dumps(message)) if path == "/v1/completions" else replay(path, body)

    out = tmp_path / "out"
    with answering(refusing) as url:
        settings = [
            "quickstart_export", f"teacher={folders[0]}", f"corpus.path={folders[1]}", "train_tokens=none",
            "validation_tokens=none", f"row_length={ROW_LENGTH}", "scorer=vllm", f"scorer_url={url}", "dtype=float32",
            f"selection.top_k={TOP_K + 1}",
        ]  # fmt: skip
        done = run("launchers.export_teacher", *configs(settings), f"--out={out}")
    assert "or set selection.top_k lower" in done.stderr
    assert not [*out.rglob("plan.json")]


def test_a_key_is_sent_and_never_shown(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with answering(always('{"error": "Unauthorized"}', 401)) as url:
        message = refused_export(*folders, url, tmp_path)
    assert "VLLM_API_KEY" in message
    assert "s3cret" not in message


def test_a_redirect_does_not_take_the_key_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with (
        answering(always("{}")) as elsewhere,
        answering(always(elsewhere, 302)) as url,
        pytest.raises(UsageError, match="refused with status 302"),
    ):
        VllmServer(url).request_json("/version")


def test_a_server_of_another_teacher_is_refused(folders: Folders, tmp_path: Path) -> None:
    def other(path: str, body: bytes) -> Reply:
        return (200, '{"tokens": [1, 2]}') if path == "/tokenize" else replay(path, body)

    with answering(other) as url:
        assert "into other tokens than" in refused_export(*folders, url, tmp_path / "out")
    many = {"data": [{"id": name, "max_model_len": CONTEXT, "parent": None} for name in ("tiny", "large")]}
    with answering(lambda path, body: (200, json.dumps(many)) if path == "/v1/models" else replay(path, body)) as url:
        assert "serves tiny, large" in refused_export(*folders, url, tmp_path / "out")
        assert "not other" in refused_export(*folders, url, tmp_path / "out", vllm={"model": "other"})
        write_caches(tiny_export(*folders, scorer_url=url, vllm={"model": "tiny"}), tmp_path / "out")


@pytest.mark.parametrize("reply", ["no JSON", "[]", "{}", '{"data": [{}]}', '{"data": [{"id": "a"}]}', "[" * 100_000])
def test_what_is_no_vllm_server_is_refused(folders: Folders, tmp_path: Path, reply: str) -> None:
    with answering(always(reply)) as url:
        assert url in refused_export(*folders, url, tmp_path)


def _recorded_window() -> tuple[dict[str, Any], list[int]]:
    key, (_, text) = next(
        (key, reply) for key, reply in read_replies().items() if "/v1/completions" in key and reply[0] == 200
    )
    return json.loads(text), json.loads(key)[1]["prompt"]


def _spoil(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    reply = copy.deepcopy(_recorded_window()[0])
    change(reply["choices"][0])
    return reply


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no entries": lambda choice: choice.pop("prompt_logprobs"),
    "null": lambda choice: choice.update(prompt_logprobs=None),
    "a position is missing": lambda choice: choice["prompt_logprobs"].pop(),
    "a position is empty": lambda choice: choice["prompt_logprobs"].__setitem__(2, {}),
    "an entry more": lambda choice: choice["prompt_logprobs"][2].update({"1": UNLIKELY, "2": UNLIKELY}),
    "a text for an id": lambda choice: choice["prompt_logprobs"][2].update({"the": UNLIKELY}),
    "NaN": lambda choice: [entry.update(logprob=math.nan) for entry in choice["prompt_logprobs"][3].values()],
    "raw logits": lambda choice: [
        entry.update(logprob=entry["logprob"] + 9) for row in choice["prompt_logprobs"][1:] for entry in row.values()
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_refused(name: str) -> None:
    reply, window = _recorded_window()
    parse_reply(reply, window, TOP_K)
    with answering(always(json.dumps(_spoil(HOSTILE[name])))) as url:
        scorer = VllmServerScorer(VllmServer(url), "tiny", 320)
        documents = torch.zeros(1, len(window) - 1, dtype=torch.int64)
        with pytest.raises(UsageError, match=r"wanted vLLM's prompt_logprobs"):
            scorer.scores(torch.tensor([window]), documents, Selection(TOP_K))


def test_a_reply_that_never_ends_is_cut() -> None:
    with (
        answering(always('"' + "x" * 5000 + '"')) as url,
        pytest.raises(UsageError, match="more than"),
    ):
        VllmServer(url).request_json("/version", most=4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": Selection(4, draws=2)}, "selection.draws: a server gives entries"),
        ({"selection": Selection(0, draws=2)}, "selection.draws: a server gives entries"),
        ({"selection": Selection(4, tail_temperatures=(2.0,))}, "selection.tail_temperatures: a server gives entries"),
        ({"dtype": "auto"}, "dtype: got auto"),
        ({"scorer_url": "http://me:secret@host"}, "scorer_url: wanted http://HOST:PORT"),
        ({"scorer_url": "file:///etc"}, "scorer_url: wanted"),
        ({"vllm": {"tensor_parallel_size": 2}}, "has its own settings"),
        ({"scorer": "decoder"}, "scorer_url: is set, but scorer is decoder"),
        ({"scorer": "auto", "scorer_url": None, "vllm": {"seed": 1}}, "vllm: is set, but scorer is auto"),
        ({"scorer_url": None, "vllm": {"trust_remote_code": True}}, "which the export decides itself"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_graph(
    folders: Folders, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        tiny_export(*folders, **{"scorer_url": "http://127.0.0.1:9", **changes})
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_settings_of_the_engine_are_part_of_the_plan(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.teacher.vllm_settings.installed_release", lambda: "vllm 9")
    settings = tiny_export(*folders, vllm={"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}).vllm_settings
    assert settings.recorded() == {"release": "vllm 9", "max_model_len": ROW_LENGTH, "tensor_parallel_size": 2}
    assert settings == VllmSettings({"max_model_len": 16, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5})
    write_json(folders[0].parent / "settings.json", settings.recorded())  # JSON holds it


@pytest.mark.parametrize(
    ("settings", "context"), [({"max_model_len": 24}, 24), ({"max_model_len": 999}, 256), ({}, 256)]
)
def test_a_teachers_context_is_no_longer_than_the_engines(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], context: int
) -> None:
    monkeypatch.setattr("data.teacher.vllm_settings.installed_release", lambda: "vllm 9")
    assert read_teacher_facts(folders[0], "vllm", vllm=VllmSettings(settings)).max_positions == context
