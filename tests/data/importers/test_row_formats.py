"""Rows of Axolotl, TRL, vLLM's server and LlamaKD, made by their documentation and sources, against the teacher."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.cache.record import UNUSED
from data.importers.formats.formats import read_lines_of
from data.importers.parsed_entries import Line
from data.importers.settings import UNKNOWN, ImportSettings
from kd_core.errors import UsageError

V, L, K = 50, 7, 4
RANDOM = np.random.default_rng(3)
TOKENS = RANDOM.integers(0, V, L)
LOGITS = RANDOM.normal(size=(L, V)) * 2
LOGS = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))  # row t: of token t + 1
TOP = np.argsort(-LOGS, axis=1)[:, :K]
TOP_LOGS = np.take_along_axis(LOGS, TOP, 1)


def _read(path: Path, kind: str, rows: list[dict[str, Any]], table: bool = False, **settings: Any) -> list[Line]:
    source = path / ("a.parquet" if table else "a.jsonl")
    if table:
        parquet.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_lines_of(ImportSettings(kind, str(source), V, UNKNOWN, **settings)))


def _check(line: Line, first: int, tokens: np.ndarray, *, scored: list[int] | None = None) -> None:
    """The record has the tokens, and from position `first` on the teacher's top K of the row of its input token."""
    record = line.record
    assert record.token_ids.tolist() == tokens.tolist()
    rows = slice(first, record.positions)
    order = np.argsort(-record.topk_log_probs[rows], axis=1)[:, :K]
    assert np.take_along_axis(record.topk_token_ids[rows], order, 1).tolist() == TOP[rows].tolist()
    if "tail" not in line.unknown:
        assert np.abs(np.take_along_axis(record.topk_log_probs[rows], order, 1) - TOP_LOGS[rows]).max() < 1e-6
        tail = 1 - np.exp(TOP_LOGS[rows]).sum(axis=1)
        assert np.abs(np.exp(record.tail_log_prob[rows]) - tail).max() < 1e-6
    assert record.loss_mask.tolist() == (scored or [1] * record.positions)


@pytest.mark.parametrize("table", [False, True])
def test_llamakd_rows(tmp_path: Path, table: bool) -> None:
    row = {"inputs": TOKENS.tolist(), "line_number": 4, "targets": np.stack([TOP_LOGS, TOP], axis=1).tolist()}
    lines = _read(tmp_path, "llamakd", [row, row], table)
    assert [line.record.document for line in lines] == [f"a.{'parquet' if table else 'jsonl'}:{i}" for i in (1, 2)]
    _check(lines[1], 0, TOKENS)
    assert lines[1].unknown == {"label_log_prob"}
    row["targets"][1][1][0] = 0.5
    with pytest.raises(UsageError, match=r":1: targets: the second list of a position holds numbers that are no ids"):
        _read(tmp_path, "llamakd", [row])
    with pytest.raises(UsageError, match=r":1: targets: \[6, 2, 4\] for 7 inputs"):
        _read(tmp_path, "llamakd", [{**row, "targets": row["targets"][1:]}])


@pytest.mark.parametrize("table", [False, True])
def test_axolotls_prepared_rows_are_shifted_and_renormalised(tmp_path: Path, table: bool) -> None:
    """Row i of the targets is of token i: the prompt's are padding, as its preprocessing leaves them."""
    prompt = 3
    padding = [-np.inf] * K
    kept = TOP_LOGS - np.log(np.exp(TOP_LOGS).sum(axis=1, keepdims=True))
    row = {
        "input_ids": TOKENS.tolist(), "labels": [*[-100] * prompt, *TOKENS[prompt:].tolist()],
        "attention_mask": [1] * L,
        "target_logprobs": [*[padding] * prompt, *kept[prompt - 1 : -1].tolist()],
        "target_token_ids": [*[list(range(K))] * prompt, *TOP[prompt - 1 : -1].tolist()],
        "target_mask": [*[[0] * K] * prompt, *[[1] * K] * (L - prompt)],
    }  # fmt: skip
    (line,) = _read(tmp_path, "axolotl", [row], table)
    _check(line, prompt - 1, TOKENS, scored=[0] * (prompt - 1) + [1] * (L - prompt))
    assert line.unknown >= {"tail"}
    assert np.exp(line.record.topk_log_probs[prompt - 1 :]).sum(axis=1) == pytest.approx(1)
    without = {name: value for name, value in row.items() if name != "target_mask"}
    _read(tmp_path, "axolotl", [{**row, "target_mask": None}], table)
    (again,) = _read(tmp_path, "axolotl", [without], table)
    assert all(
        (a == b).all() for a, b in zip(again.record.arrays().values(), line.record.arrays().values(), strict=True)
    )
    # Entries that are not used may hold anything. JSON has null for −inf.
    nulls = [[None if number == -np.inf else number for number in numbers] for numbers in row["target_logprobs"]]
    further = {"target_token_ids": (row["target_token_ids"], -1), "target_logprobs": (nulls, None)}
    further["target_mask"] = (row["target_mask"], 0)
    changed = {name: [[*values, last] for values in lists] for name, (lists, last) in further.items()}
    (again,) = _read(tmp_path, "axolotl", [{**row, **changed}], table)
    assert again.record.label_log_prob.tolist() == line.record.label_log_prob.tolist()
    raw = {"messages": [], "logprobs": [[{"token": "token_id:5", "logprob": -0.1}]]}
    with pytest.raises(UsageError, match=r":1: has no input_ids, so .* Run `axolotl preprocess`"):
        _read(tmp_path, "axolotl", [raw], table)


@pytest.mark.parametrize("table", [False, True])
def test_trls_rows_score_the_completion(tmp_path: Path, table: bool) -> None:
    P = 3
    row = {
        "prompt_ids": TOKENS[:P].tolist(), "completion_ids": TOKENS[P:].tolist(),
        "logprobs": TOP_LOGS[P - 1 : -1].tolist(), "logprob_token_ids": TOP[P - 1 : -1].tolist(),
        "actual_logprobs": [[float(LOGS[t, TOKENS[t + 1]])] for t in range(P - 1, L - 1)],
    }  # fmt: skip
    (line,) = _read(tmp_path, "trl", [row], table)
    _check(line, P - 1, TOKENS, scored=[0] * (P - 1) + [1] * (L - P))
    assert line.unknown == set()
    labels = LOGS[np.arange(P - 1, L - 1), TOKENS[P:]]
    assert np.abs(line.record.label_log_prob[P - 1 :] - labels).max() < 1e-6
    with pytest.raises(UsageError, match=r":1: has 6 rows of ids and 5 of numbers for 6 positions"):
        _read(tmp_path, "trl", [{**row, "logprobs": row["logprobs"][1:]}])
    with pytest.raises(UsageError, match=r":1: has 0 prompt_ids and 4 completion_ids"):
        _read(tmp_path, "trl", [{**row, "prompt_ids": []}])


def _vllm_entry(t: int, token: int, k: int = K) -> dict[str, Any]:
    """Entry t + 1 as the server writes it: the actual token first, then the top k, each once."""
    rank = int((LOGS[t] > LOGS[t, token]).sum()) + 1
    entry = {str(token): {"logprob": float(LOGS[t, token]), "rank": rank, "decoded_token": "x"}}
    for place, other in enumerate(TOP[t, :k].tolist(), 1):
        entry.setdefault(str(other), {"logprob": float(LOGS[t, other]), "rank": place, "decoded_token": "y"})
    return entry


def _prompt() -> dict[str, Any]:
    entries = [None, *(_vllm_entry(t, int(TOKENS[t + 1])) for t in range(L - 1))]
    return {"prompt_token_ids": TOKENS.tolist(), "prompt_logprobs": entries}


def test_vllms_replies_in_every_envelope(tmp_path: Path) -> None:
    one = _prompt()
    rows = [
        {"id": "cmpl-1", "choices": [{"index": 0, "text": "", **one}]},
        {"prompt": one["prompt_token_ids"], "choices": [{"prompt_logprobs": one["prompt_logprobs"]}]},
        {
            "prompt_logprobs": one["prompt_logprobs"],
            "prompt_token_ids": TOKENS.tolist(),
            "choices": [{"token_ids": [5], "prompt_logprobs": None, "prompt_token_ids": None}],
        },
        # Two samples of a prompt
        {"custom_id": "r", "response": {"status_code": 200, "body": {"choices": [one, one]}}},
        {"prompt": [TOKENS.tolist()], "choices": [{"prompt_logprobs": one["prompt_logprobs"]}] * 2},
        {"prompt": TOKENS.tolist(), "choices": [{"prompt_logprobs": one["prompt_logprobs"]}] * 2},
    ]
    lines = _read(tmp_path, "vllm", rows)
    names = [f"a.jsonl:{name}" for name in ("1", "2", "3", "4", "5", "6")]
    assert [line.record.document for line in lines] == names
    labels = LOGS[np.arange(L - 1), TOKENS[1:]]
    is_entry = (TOP[: L - 1] == TOKENS[1:, None]).any(axis=1)
    assert 0 < is_entry.sum() < L - 1 or not is_entry.any()
    for line in lines:
        _check(line, 0, TOKENS)
        # The label's log-probability comes with every reply, also where the label is none of the top k.
        assert line.unknown == set()
        assert np.abs(line.record.label_log_prob - labels).max() < 1e-6
        assert (line.record.topk_log_probs > UNUSED).sum(axis=1).min() == K


def test_each_prompt_of_a_vllm_reply_is_taken_once(tmp_path: Path) -> None:
    """Two prompts with two samples each."""
    one = _prompt()
    shorter = {name: values[:-1] for name, values in one.items()}
    for row in (
        {"choices": [one, one, shorter, shorter]},
        {
            "prompt": [prompt["prompt_token_ids"] for prompt in (one, shorter)],
            "choices": [{"prompt_logprobs": prompt["prompt_logprobs"]} for prompt in (one, one, shorter, shorter)],
        },
    ):
        lines = _read(tmp_path, "vllm", [row])
        assert [line.record.document for line in lines] == ["a.jsonl:1/0", "a.jsonl:1/1"]
        assert [line.record.positions for line in lines] == [L - 1, L - 2]


def test_vllms_ties_infinities_and_mistakes(tmp_path: Path) -> None:
    one = _prompt()
    # An actual token that the teacher excludes: the server writes −9999 for −∞. It is no entry, and is not scored.
    excluded = json.loads(json.dumps(one))
    excluded["prompt_logprobs"][2][str(TOKENS[2])] = {"logprob": -9999.0, "rank": V}
    (line,) = _read(tmp_path, "vllm", [excluded])
    assert line.record.loss_mask.tolist() == [1, 0, *[1] * (L - 3)]
    # The label is the last of the top k by a tie of its log-probability, and stays an entry.
    tie = json.loads(json.dumps(one))
    last = TOP[0, K - 1]
    tie["prompt_logprobs"][1] = _vllm_entry(0, int(last))
    tie["prompt_token_ids"][1] = int(last)
    (line,) = _read(tmp_path, "vllm", [tie])
    assert sorted(line.record.topk_token_ids[0].tolist()) == sorted(TOP[0].tolist())
    # Unnormalised logits, as with logprobs_mode=raw_logits, are refused, or renormalised when they are said to be such.
    raw = json.loads(json.dumps(one))
    for t, entry in enumerate(raw["prompt_logprobs"][1:]):
        for key, value in entry.items():
            value["logprob"] = float(LOGITS[t, int(key)])
    with pytest.raises(UsageError, match="entries sum to .*say --values=logits"):
        _read(tmp_path, "vllm", [raw])
    (line,) = _read(tmp_path, "vllm", [raw], values="logits")
    assert "tail" in line.unknown
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt_token_ids": None}, "has no prompt_token_ids. Ask the server with return_token_ids"),
        ({"prompt_token_ids": TOKENS[:-1].tolist()}, "prompt_logprobs: 7 for 6 tokens"),
        ({"prompt_token_ids": TOKENS[::-1].tolist()}, r"prompt_logprobs: token \d is \d+, which has no entry"),
        ({"prompt_logprobs": None}, "prompt_logprobs: None for 7 tokens"),
        ({"prompt_logprobs": [None] * L}, "prompt_logprobs: of token 1 None; wanted an object of tokens"),
        ({"choices": []}, r"choices: .*; wanted one for each prompt. Did the request fail\?"),
        ({"choices": {}}, r"choices: .*; wanted one for each prompt"),
        ({"choices": ["x"]}, "a field is of another type than vllm has"),
        ({"choices": [{}] * 3, "prompt_token_ids": [[1, 2], [3, 4]]}, "has 3 choices of 2 prompts"),
    ]
    for change, message in cases:
        with pytest.raises(UsageError, match=rf"a\.jsonl:1: {message}"):
            _read(tmp_path, "vllm", [{**one, **change}])
    with pytest.raises(UsageError, match="response.body: None; wanted the server's reply. Did the request fail?"):
        _read(tmp_path, "vllm", [{"custom_id": "r", "response": {"status_code": 500}}])
    for failed in ({"response": None}, {"response": {"body": {"error": {"code": 400}}}}, {"error": {"code": 400}}):
        with pytest.raises(UsageError, match=r"response.body: .* Did the request fail\?"):
            _read(tmp_path, "vllm", [failed])
    one["prompt_logprobs"][2][str(TOKENS[2])]["logprob"] = float("nan")
    with pytest.raises(UsageError, match="prompt_logprobs: of token 2 an entry that is not a number"):
        _read(tmp_path, "vllm", [one])


def test_settings_of_other_formats_are_refused(tmp_path: Path) -> None:
    for kind, settings, message in (
        ("jsonl", {"tokens": "a.npy"}, "--tokens and --loss_mask: jsonl has the tokens in its rows"),
        ("trl", {"compression": "a.yml"}, "--compression is of distillkit"),
        ("nemo_aligner", {"values": "logits"}, "--values: nemo_aligner says itself what its numbers are"),
        ("other", {}, "--format: got 'other'; wanted one of nemo_aligner, jsonl, distillkit"),
    ):
        with pytest.raises(UsageError, match=message):
            _read(tmp_path, kind, [], **settings)


def test_replies_that_vllms_server_wrote() -> None:
    """`vllm_replies.jsonl`: replies of vLLM 0.32 to a prompt once and twice, with the quick start's teacher."""
    source = Path(__file__).parent / "vllm_replies.jsonl"
    choices = [json.loads(text)["choices"][0] for text in source.read_text().splitlines()]
    lines = list(read_lines_of(ImportSettings("vllm", str(source), 49_152, UNKNOWN)))
    assert [line.record.document.partition(":")[2] for line in lines] == ["1", "2"]
    assert len(lines) == len(choices) == 2
    for line, choice in zip(lines, choices, strict=True):
        tokens, record = choice["prompt_token_ids"], line.record
        assert record.token_ids.tolist() == tokens
        assert line.unknown == set()
        for t, entry in enumerate(choice["prompt_logprobs"][1:]):
            label = entry[str(tokens[t + 1])]
            assert record.label_log_prob[t] == pytest.approx(label["logprob"], abs=1e-6)
            # The entries are the likeliest three tokens, and a fourth where the actual token is just behind them.
            top = {
                int(key): e["logprob"] for key, e in entry.items() if e["rank"] <= 3 or label["rank"] == e["rank"] == 4
            }
            used = record.topk_log_probs[t] > UNUSED
            found = dict(
                zip(record.topk_token_ids[t, used].tolist(), record.topk_log_probs[t, used].tolist(), strict=True)
            )
            assert found == pytest.approx(top, abs=1e-6)
            assert np.exp(record.tail_log_prob[t]) == pytest.approx(1 - sum(np.exp(list(top.values()))), abs=1e-6)
