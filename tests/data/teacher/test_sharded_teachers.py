"""Teachers laid out over ranks, of our decoder and of transformers: the scores of one process, and of float64."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from data.teacher import scorer, transformers_scorer
from data.teacher.scorer import TeacherScores
from data.teacher.teacher_layout import WHOLE_COPIES, TeacherParallel
from data.teacher.teacher_memory import rank_holding
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from tests.data.teacher.sharded import REAL, SELECTION, Task, compare, few_positions, refuse, refuse_heads
from tests.ranks import run_ranks
from tests.reference.teacher_scores import check_scores

ROWS, V = 3, 53  # no multiple of 2 or 4, and two of them are padding
FLOAT64_ERROR = 4e-5  # nats of a log-probability between float32 and float64
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
TP2, TP4 = TeacherParallel(2), TeacherParallel(4)
FULL, TP2_FULL = TeacherParallel(shard="full"), TeacherParallel(2, shard="full")
# Families by name: our decoder or transformers, the configuration, and the layouts of two and of four ranks.
TEACHERS: dict[str, tuple[bool, PreTrainedConfig, list[TeacherParallel], list[TeacherParallel]]] = {
    "tied": (True, LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True), [TP2, FULL], [TP2, TP2_FULL]),
    "untied": (True, LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False), [TP2], [TP4, FULL]),
    "biases": (True, Qwen2Config(**SIZES, **HEADS), [TP2], []),
    "soft cap, ours": (True, Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=4.0), [TP2], []),
    "soft cap": (False, Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=4.0), [TP2, FULL], [TP2, TP2_FULL]),
    "bias of the head": (False, PhiConfig(**SIZES, num_attention_heads=4), [TP2], []),
    "experts, divided": (False, MixtralConfig(**SIZES, **HEADS, num_local_experts=4), [TP2], [TP2_FULL]),
    "experts, whole": (
        False,
        Qwen3MoeConfig(**SIZES, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        [TeacherParallel(2, expert_parallel=True)],
        [],
    ),
    "one head for keys": (False, LlamaConfig(**SIZES, **{**HEADS, "num_key_value_heads": 1}), [], []),
    "no plan": (False, GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64), [], [FULL]),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "chunk_positions", few_positions)
    monkeypatch.setattr(transformers_scorer, "chunk_positions", few_positions)


def _make_task(folder: Path, name: str, ranks: int) -> Task:
    """A random teacher with its scores in one process, which are those of its logits in float64."""
    is_decoder, config, *layouts = TEACHERS[name]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokens, T = torch.randint(REAL, (ROWS, 15)), 14
    documents = torch.arange(ROWS)[:, None].repeat(1, T)
    uniforms = torch.rand(ROWS * T, SELECTION.draws, dtype=torch.float64)
    task = Task(
        folder, is_decoder, layouts[ranks > 2], tokens, documents, uniforms, TeacherScores(*[torch.empty(0)] * 7)
    )
    task.one = task.score(task.load(WHOLE_COPIES, World()))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        truth = model(tokens[:, :-1]).logits[..., :REAL].flatten(0, 1)
    check_scores(task.one, truth, tokens[:, 1:].flatten(), uniforms, SELECTION, FLOAT64_ERROR)
    return task


def _tasks(root: Path, is_decoder: bool, ranks: int) -> dict[str, Task]:
    names = [name for name, teacher in TEACHERS.items() if teacher[0] == is_decoder and teacher[2 if ranks == 2 else 3]]
    return {name: _make_task(root / name, name, ranks) for name in names}


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_of_our_decoder_gives_the_scores_of_one_process(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, compare, _tasks(tmp_path, True, ranks))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_of_transformers_gives_the_scores_of_one_process(tmp_path: Path, ranks: int) -> None:
    """Also a mixture of experts; a family without a plan for tensor parallelism is refused."""
    run_ranks(ranks, compare, _tasks(tmp_path, False, ranks))


@pytest.mark.slow
def test_a_family_without_a_plan_is_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse, _make_task(tmp_path, "no plan", 2))


@pytest.mark.slow
def test_heads_that_are_not_divided_are_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_heads, _make_task(tmp_path, "one head for keys", 2))


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        (
            Qwen3MoeConfig(**SIZES, **HEADS, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24),
            TeacherParallel(4, expert_parallel=True),
            r"expert_parallel: 4 ranks .* cannot hold the 6 experts of .* Take 2, 3, 6 ranks",
        ),
        (TEACHERS["no plan"][1], TP2, "tensor_parallel: transformers has no plan for GPT2LMHeadModel"),
    ],
)
def test_a_dry_run_refuses_what_the_start_would(
    tmp_path: Path, config: PreTrainedConfig, parallel: TeacherParallel, message: str
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        rank_holding(tmp_path, "transformers", parallel, parallel.engine().layout(4))
