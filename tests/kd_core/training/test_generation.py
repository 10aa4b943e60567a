"""Greedy continuations are those of plain decoding, whoever holds the student."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.decoder.rope import YarnScaling
from kd_core.students.families.registry import family_decoder
from kd_core.students.huggingface.config_json import parse_architecture
from kd_core.students.layer_importance import LayerwiseText
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.generation import append_tokens, continue_greedily
from kd_core.types import LmHeadForm
from tests.kd_core.students.models import their_config
from tests.ranks import run_ranks
from tests.tiny import Tiny

FLOAT32 = Parallel(precision="float32")
PROMPTS = [[5, 40, 7], [260], [100, 90, 80, 70, 261, 3, 9]]
TOKENS = 6


def plainly(model: Decoder, prompt: list[int]) -> list[int]:
    """A prompt by itself, the whole logits of a whole pass for each token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
            ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_prompts_of_any_length_together_are_continued_as_each_alone(tiny: Tiny) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    wanted = [plainly(model, prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in wanted}) > 1
    assert continue_greedily(model, PROMPTS, TOKENS, FLOAT32, World()) == wanted


# Arithmetic that a cached pass must agree in, beside that of the tiny teacher.
BASE = Architecture(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-6, tie_embeddings=False, max_positions=64,
)  # fmt: skip
ARCHITECTURES = {
    "windows": replace(BASE, windows=(3, None, 5)),
    "one kv head, norms and biases": replace(BASE, num_kv_heads=1, qk_norm=True, qkv_bias=True),
    "scales and yarn": replace(
        BASE, attention_scale=0.5, logit_scale=0.3, residual_scale=0.7, embedding_scale=2.0,
        rope_scaling=YarnScaling(4.0, 16, 1.1),
    ),
    "padded vocabulary": replace(BASE, vocab_size=200, padded_vocab_size=300),
}  # fmt: skip


def _random(kind: type[Decoder], arch: Architecture, seed: int = 0) -> Decoder:
    model, generator = kind(arch), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_changes_no_token_of_random_models(name: str) -> None:
    prompts = [*PROMPTS, [199] * 12]
    for seed in range(4):
        model = _random(Decoder, ARCHITECTURES[name], seed)
        wanted = [plainly(model, prompt) for prompt in prompts]
        assert len({token for ids in wanted for token in ids}) > 5
        assert continue_greedily(model, prompts, TOKENS, FLOAT32, World()) == wanted


class Headed(Decoder):
    """A decoder whose logits have a bias, a factor and a soft cap, and that has no cache."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        self.bias = torch.nn.Parameter(torch.empty(arch.vocab_rows))

    @property
    def lm_head_form(self) -> LmHeadForm:
        return LmHeadForm(self.bias, self.arch.vocab_size, scale=-0.5, soft_cap=3.0)

    def new_cache(self, slots: int) -> None:
        del slots


def test_the_whole_form_of_the_head_decides_with_a_cache_and_without() -> None:
    arch = ARCHITECTURES["padded vocabulary"]
    without, cached = _random(Headed, arch), _random(type("Cached", (Headed,), {"new_cache": Decoder.new_cache}), arch)

    def greedy(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            hidden = without(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids), lambda hidden, _: hidden)
            product = hidden[0, -1].double() @ without.lm_head.weight[:200].double().t()
            logits = 3 * torch.tanh((-0.5 * product + without.bias[:200].double()) / 3)
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        return ids[0, len(prompt) :].tolist()

    wanted = [greedy(prompt) for prompt in PROMPTS]
    for model in (without, cached):
        assert continue_greedily(model, PROMPTS, TOKENS, FLOAT32, World()) == wanted


def test_a_cached_pass_takes_one_token_a_row_and_waits_for_none() -> None:
    """Fake tensors have no values, so that a number that is read from one is an error."""
    widths: list[int] = []
    with FakeTensorMode(), torch.no_grad():
        model = Decoder(ARCHITECTURES["windows"])
        model.embed_tokens.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
        ids, lengths = torch.zeros(3, 20, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
        assert append_tokens(model, ids, lengths, longest=7, tokens=4).shape == (3, 20)
    assert widths == [7, 1, 1, 1]


def on_ranks(world: World, folder: str, wanted: list[list[int]]) -> None:
    layouts = [
        replace(FLOAT32, shard="full"),
        replace(FLOAT32, tensor_parallel=2),
        replace(FLOAT32, tensor_parallel=2, sequence_parallel=True),
        replace(FLOAT32, context_parallel=2),
    ]
    for parallel in layouts:
        laid_out = world.with_layout(parallel.layout(world.size))
        start = Pretrained(folder)
        model = parallelize(start.build_on_meta(), parallel, laid_out)
        start.fill(model, 0)
        assert continue_greedily(model, PROMPTS, TOKENS, parallel, laid_out) == wanted, parallel
        assert all(p.grad is None for p in model.parameters())


def test_ranks_continue_as_one_process(tiny: Tiny) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    run_ranks(2, on_ranks, str(tiny.teacher), continue_greedily(model, PROMPTS, TOKENS, FLOAT32, World()))


def test_passes_beyond_the_original_context_of_longrope_are_refused() -> None:
    """Of a continuation, and of text that measures layers."""
    model = family_decoder(parse_architecture(Path("config.json"), their_config("phi3, longrope").to_dict()))
    with pytest.raises(UsageError, match="prompts: got a document of 49 positions; wanted at most 48, for LongRoPE"):
        continue_greedily(model, [[1] * 46, [2]], 4, FLOAT32, World())
    with pytest.raises(UsageError, match="row_length: got a document of 49 positions"):
        LayerwiseText(model, torch.zeros(1, 50, dtype=torch.int64))
    model.arch.check_length(48, "of 48 positions, it is not")
