"""Shifted labels are found in small samples of a teacher that knows; one that knows nothing raises no alarm."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.cache.alignment import check_alignment
from data.cache.record import UNUSED, Record
from data.cache.selection import Selection
from data.teacher.select import select_entries
from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.student import allocate
from tests.tiny import Tiny

POSITIONS = 100
ARCH = Architecture(
    vocab_size=305, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=256,
)  # fmt: skip


def _random_teacher(arch: Architecture, std: float, top_k: int, seed: int) -> Record:
    """A text whose words are as frequent as in language, scored by random weights: aligned by construction."""
    torch.manual_seed(seed)
    model = allocate(meta_decoder(arch), torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0, std)
    frequent = 1 / torch.arange(1, arch.vocab_size + 1)
    tokens = torch.multinomial(frequent, POSITIONS + 1, replacement=True)
    with torch.no_grad():
        at, one = torch.arange(POSITIONS)[None], torch.zeros(1, POSITIONS, dtype=torch.int64)
        logits = model(tokens[None, :-1], at, one)[0]
    scores = select_entries(logits, tokens[1:], Selection(top_k=top_k), torch.empty(POSITIONS, 0))
    return Record(
        name="0", document="random", start=0, token_ids=tokens.numpy().astype(np.int32),
        loss_mask=np.ones(POSITIONS, bool), topk_token_ids=scores.ids.numpy().astype(np.int32),
        topk_log_probs=scores.log_probs.numpy(), tail_log_prob=scores.tail_log_prob.numpy(),
        label_log_prob=scores.label_log_prob.numpy(),
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("std", [0.02, 0.1, 0.2, 0.5])
@pytest.mark.parametrize(("hidden", "layers"), [(32, 2), (128, 1), (512, 1)])
@pytest.mark.parametrize("top_k", [8, 64])
def test_a_random_teacher_raises_no_alarm(hidden: int, layers: int, std: float, tied: bool, top_k: int) -> None:
    """With a tied head and few layers, it takes its own input for likelier than the next token, at every position."""
    arch = replace(ARCH, hidden_size=hidden, num_layers=layers, head_dim=hidden // 4, tie_embeddings=tied)
    check_alignment([_random_teacher(arch, std, top_k, seed=hidden + top_k)], "cache")


def _tokens_rolled(record: Record, shift: int) -> Record:
    return replace(record, token_ids=np.roll(record.token_ids, shift))


def _and_labels_scored_again(record: Record, shift: int) -> Record:
    """By hand, as a converter does that is given entries alone: of the label's entry, or less than all of them."""
    rolled = _tokens_rolled(record, shift)
    logs = record.topk_log_probs.min(axis=1) - 1
    for at, label in enumerate(rolled.token_ids[1:]):
        for entry, log_prob in zip(record.topk_token_ids[at], record.topk_log_probs[at], strict=True):
            if entry == label and log_prob > UNUSED:
                logs[at] = log_prob
    return replace(rolled, label_log_prob=logs.astype(np.float32))


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("changed", [_tokens_rolled, _and_labels_scored_again])
def test_a_shift_is_found_in_any_single_record(
    tiny: Tiny, changed: Callable[[Record, int], Record], shift: int
) -> None:
    long_enough = [record for record in tiny.records() if record.positions >= 12]
    assert len(long_enough) > 20
    for record in long_enough:
        check_alignment([record], "cache")
        check_alignment([_and_labels_scored_again(record, 0)], "cache")
        with pytest.raises(UsageError, match="shifted against the teacher"):
            check_alignment([changed(record, shift)], "cache")


def test_a_label_or_two_that_disagree_are_no_shift(tiny: Tiny) -> None:
    record = max(tiny.records(), key=lambda each: each.positions)
    logs = record.label_log_prob.copy()
    logs[:2] -= 1.0
    check_alignment([replace(record, label_log_prob=logs)], "cache")
    logs[:4] -= 1.0
    with pytest.raises(UsageError, match="agree in 0.99"):
        check_alignment([replace(record, label_log_prob=logs)], "cache")


def test_records_of_a_token_or_two_are_nothing_to_go_by(tiny: Tiny) -> None:
    short = [record for record in tiny.records() if record.positions <= 2]
    check_alignment(short, "cache")
    check_alignment([], "cache")
