"""Widths measured and cut, held against transformers: activations that its own modules see, and masked activations."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.decoder.transformer_block import TransformerBlock
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.huggingface.weights import stored_tensors
from kd_core.students.layer_importance import LayerwiseText
from kd_core.students.starts.choose_pruning import PruningRequest, choose_pruning
from kd_core.students.starts.pruned_start import CutTensor, PrunedStart
from kd_core.students.starts.start import build_student
from kd_core.students.width_importance import WidthImportance, measure_widths
from kd_core.students.width_selection import WidthSelection, narrower, select_widths
from tests.kd_core.students.models import CPU, FAMILIES, load, rows, their_model

LAYERS = (0, 2)
WIDTHS = {"hidden_size": 20, "intermediate_size": 31, "num_kv_heads": 1, "num_heads": 1}
TOKENS = rows()[0]
DENSE = {name: entry for name, entry in FAMILIES.items() if not any("experts" in setting for setting in entry[1])}


def _measure(
    model: Decoder, tokens: Tensor = TOKENS, layers: tuple[int, ...] | None = None, rows: int = 1
) -> WidthImportance:
    layers = tuple(range(model.arch.num_layers)) if layers is None else layers
    return measure_widths(model, layers, tokens.split(rows), lambda _: None)


@torch.no_grad()
def _logits(model: Decoder) -> Tensor:
    return model(*rows())


def _keep(model: Decoder, layers: tuple[int, ...] | None = None, **widths: int) -> WidthSelection:
    layers = tuple(range(model.arch.num_layers)) if layers is None else layers
    return select_widths(_measure(model, layers=layers), model, narrower(model.arch, widths), layers)


def _folder(name: str, folder: Path, **changes: Any) -> Any:
    theirs = their_model(name, **changes)
    theirs.save_pretrained(folder)
    return theirs


@contextmanager
def _seen(modules: dict[str, Any]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of modules, in float64."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(
                module.register_forward_hook(
                    lambda _, args, out, name=name: seen.update({name: (args[0].double(), out.double())})
                )
            )
        yield seen


def test_importance_is_that_of_activations_in_transformers(tmp_path: Path) -> None:
    theirs = _folder("qwen3", tmp_path)
    found, layers = _measure(load(tmp_path)), theirs.model.layers
    norms = {"norm": theirs.model.norm}
    for i, layer in enumerate(layers):
        norms |= {
            f"layers.{i}.{name}": getattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")
        }
    inside = {f"down {i}": layer.mlp.down_proj for i, layer in enumerate(layers)}
    inside |= {f"output {i}": layer.self_attn.o_proj for i, layer in enumerate(layers)}
    with torch.no_grad(), _seen(norms | inside) as seen:
        theirs(TOKENS[:, :-1])

    def over_rows(values: Tensor) -> Tensor:
        return torch.stack([row.sum(0) / len(row) for row in values]).pow(2).mean(0).sqrt()

    hidden = sum(over_rows(seen[name][1].abs()) for name in norms) / len(norms)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-5, atol=0)
    for i in range(len(layers)):
        torch.testing.assert_close(found.feed_forward[i], over_rows(seen[f"down {i}"][0].abs()), rtol=1e-5, atol=0)
        heads = torch.stack([part.pow(2).sum(-1).sqrt() for part in seen[f"output {i}"][0].split(16, dim=-1)], dim=-1)
        torch.testing.assert_close(found.heads[i], over_rows(heads), rtol=1e-5, atol=0)
    for name in norms:
        unit = torch.nn.functional.normalize(seen[name][0], dim=-1) * 32**0.5
        torch.testing.assert_close(found.energy[name], unit.pow(2).mean((0, 1)), rtol=1e-5, atol=0)


def test_importance_does_not_depend_on_batches(tmp_path: Path) -> None:
    _folder("llama", tmp_path)
    model, tokens = load(tmp_path), TOKENS.repeat(3, 1)[:5].roll(1, 0)
    once, often = _measure(model, tokens, rows=5), _measure(model, tokens, rows=2)
    for whole, parts in zip(
        [once.hidden, *once.feed_forward, *once.heads], [often.hidden, *often.feed_forward, *often.heads], strict=True
    ):
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


def test_permuted_channels_and_heads_have_permuted_importances(tmp_path: Path) -> None:
    _folder("llama, tied, with biases", tmp_path)
    model = load(tmp_path)
    before = _measure(model)
    draw = torch.Generator().manual_seed(4)
    hidden, inner = torch.randperm(32, generator=draw), torch.randperm(48, generator=draw)
    heads, kv_heads = torch.tensor([3, 2, 0, 1]), torch.tensor([1, 0])  # groups change places, and heads in one
    all_of = {"hidden": hidden, "inner": inner}
    all_of |= {
        name: (order[:, None] * 8 + torch.arange(8)).flatten() for name, order in (("q", heads), ("kv", kv_heads))
    }
    kinds = {"q_proj": "q", "k_proj": "kv", "v_proj": "kv", "gate_proj": "inner", "up_proj": "inner"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.split(".")[-2]
            if module in kinds:
                parameter.copy_(parameter[all_of[kinds[module]]])
            if parameter.ndim == 2:
                inputs = {"o_proj": "q", "down_proj": "inner"}.get(module, "hidden")
                parameter.copy_(parameter[:, all_of[inputs]])
            if module in ("o_proj", "down_proj") or "norm" in module:
                parameter.copy_(parameter[hidden])
    after = _measure(model)
    torch.testing.assert_close(after.hidden, before.hidden[hidden], rtol=1e-5, atol=0)
    for i in range(3):
        torch.testing.assert_close(after.feed_forward[i], before.feed_forward[i][inner], rtol=1e-5, atol=0)
        torch.testing.assert_close(after.heads[i], before.heads[i][heads], rtol=1e-5, atol=0)


class _Pair(NamedTuple):
    """A model of transformers, its folder, and the student that is read from it."""

    theirs: Any
    folder: Path
    whole: Decoder


@pytest.fixture(scope="module", params=DENSE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Pair:
    folder = tmp_path_factory.mktemp("family")
    # A small epsilon, since a norm of fewer channels adds it to another mean.
    return _Pair(_folder(request.param, folder, rms_norm_eps=1e-10), folder, load(folder))


def test_full_width_has_the_same_bits(pair: _Pair) -> None:
    _, folder, whole = pair
    kept = _keep(whole)
    pruned = build_student(PrunedStart(str(folder), kept), CPU, seed=0)
    assert pruned.arch == whole.arch
    assert set(kept.shares.values()) == {1.0}
    parameters = dict(pruned.named_parameters())
    assert all(torch.equal(values, parameters[name]) for name, values in whole.named_parameters())


def _mask(theirs: Any, kept: WidthSelection, stack: ExitStack) -> None:
    """Sets to zero what is not kept: outputs into the residual stream, and inputs of `down_proj` and `o_proj`."""

    def times(size: int, indices: Tensor) -> Callable[[Tensor], Tensor]:
        mask = torch.zeros(size).index_fill(0, indices, 1.0)
        return lambda x: (x.unflatten(-1, (size, -1)) * mask[:, None]).flatten(-2)

    hidden = times(theirs.config.hidden_size, kept.hidden)
    into_stream = [theirs.model.embed_tokens]
    chosen = kept.feed_forward, kept.heads, kept.kv_heads
    for block, channels, heads, kv_heads in zip(theirs.model.layers, *chosen, strict=True):
        attention, down = block.self_attn, block.mlp.down_proj
        into_stream += [attention.o_proj, down]
        if getattr(attention, "q_norm", None) is not None:  # may be over all heads
            q = times(theirs.config.num_attention_heads, heads)
            stack.enter_context(attention.q_proj.register_forward_hook(lambda _, __, out, q=q: q(out)))
            k = times(theirs.config.num_key_value_heads, kv_heads)
            stack.enter_context(attention.k_proj.register_forward_hook(lambda _, __, out, k=k: k(out)))
        for module, size, indices in (
            (attention.o_proj, theirs.config.num_attention_heads, heads),
            (down, theirs.config.intermediate_size, channels),
        ):
            hook = partial(lambda masked, _, args: (masked(args[0]),), times(size, indices))
            stack.enter_context(module.register_forward_pre_hook(hook))
    for module in into_stream:
        stack.enter_context(module.register_forward_hook(lambda _, __, out: hidden(out)))


def test_a_pruned_student_is_the_model_with_activations_masked(pair: _Pair) -> None:
    """A norm of D channels, of which n are not zero, gives √(D / n) times what a norm of these n channels gives."""
    theirs, folder, whole = pair
    widths = {**WIDTHS, "num_heads": whole.arch.num_heads // whole.arch.num_kv_heads}
    importance = _measure(whole)
    ratio = {name: whole.arch.num_kv_heads if "self_attn." in name else 32 / 20 for name in importance.energy}
    energy = {name: torch.full_like(values, ratio[name]) for name, values in importance.energy.items()}
    arch, layers = narrower(whole.arch, widths), tuple(range(whole.arch.num_layers))
    kept = select_widths(replace(importance, energy=energy), whole, arch, layers)
    pruned = build_student(PrunedStart(str(folder), kept), CPU, seed=0).eval()
    with torch.no_grad(), ExitStack() as stack:
        _mask(theirs, kept, stack)
        masked = theirs(TOKENS).logits
    assert (_logits(pruned) - masked).abs().max() < 2e-4 * masked.abs().max()


@pytest.mark.parametrize(
    "pair", {family: name for name, (family, _) in reversed(DENSE.items())}.values(), indirect=True
)
def test_transformers_reads_a_pruned_folder(pair: _Pair, tmp_path: Path) -> None:
    _, folder, whole = pair
    pruned = build_student(PrunedStart(str(folder), _keep(whole, LAYERS, **WIDTHS)), CPU, seed=0).eval()
    save_pretrained(pruned, tmp_path / "pruned", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation="eager").eval()
    with torch.no_grad():
        difference = (theirs(TOKENS).logits - _logits(pruned)).abs().max()
    assert difference < 1e-4 * _logits(pruned).abs().max()
    assert torch.equal(_logits(load(tmp_path / "pruned")), _logits(pruned))


def test_what_is_zero_everywhere_goes_first_and_changes_no_logit(tmp_path: Path) -> None:
    """Channels that no embedding and no layer writes, feed-forward channels without a gate, a group without values."""
    theirs = _folder("llama, tied, with biases", tmp_path, rms_norm_eps=1e-10)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[:, 5:9] = 0
        for layer in theirs.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[5:9] = linear.bias[5:9] = 0
            for values, zeros in ((layer.mlp.gate_proj, slice(40, 48)), (layer.self_attn.v_proj, slice(0, 8))):
                values.weight[zeros] = values.bias[zeros] = 0
        wanted = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path)
    kept = _keep(load(tmp_path), hidden_size=28, intermediate_size=40, num_kv_heads=1)
    assert kept.hidden.tolist() == [*range(5), *range(9, 32)]
    assert [heads.tolist() for heads in kept.heads] == [[2, 3]] * 3
    pruned = build_student(PrunedStart(str(tmp_path), kept), CPU, seed=0)
    assert (_logits(pruned) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_query_heads_are_thinned_evenly_and_whole_groups_go_by_their_sum(tmp_path: Path) -> None:
    _folder("llama", tmp_path, num_attention_heads=8, num_key_value_heads=4)
    model = load(tmp_path)
    importance = WidthImportance(torch.rand(32), [torch.rand(48)], [torch.tensor([5, 1, 2, 2, 0, 7, 3, 2.0])], {})
    kept = select_widths(importance, model, narrower(model.arch, {"num_kv_heads": 3, "num_heads": 3}), (1,))
    assert (kept.heads[0].tolist(), kept.kv_heads[0].tolist()) == ([0, 5, 6], [0, 2, 3])
    kept = select_widths(importance, model, narrower(model.arch, {"num_kv_heads": 2}), (1,))
    assert (kept.heads[0].tolist(), kept.arch.num_heads) == ([0, 1, 4, 5], 4)


def test_a_cut_tensor_reads_any_box(tmp_path: Path) -> None:
    _folder("llama", tmp_path)
    stored = next(iter(stored_tensors([tmp_path / "model.safetensors"])))
    whole = stored.read((slice(0, stored.shape[0]), slice(0, stored.shape[1])))
    kept = [torch.tensor([1, 4, 5, 30]), torch.tensor([0, 7, 8])]
    cut = CutTensor(stored, kept, 0.5)
    assert cut.shape == (4, 3)
    assert torch.equal(cut.read((slice(1, 4), slice(0, 2))), 0.5 * whole[[4, 5, 30]][:, [0, 7]])
    assert cut.read((slice(2, 2), slice(0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"hidden_size": 33}, "--hidden_size=33: wanted 1 to 32"),
        ({"intermediate_size": 0}, "--intermediate_size=0: wanted 1 to 48"),
        ({"num_heads": 3}, "--num_heads=3: wanted 2, 4, so that each of 2 kv heads"),
        ({"num_kv_heads": 1, "num_heads": 4}, "--num_heads=4: wanted 1, 2, so that each of 1 kv heads"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused(widths: dict[str, int], message: str, tmp_path: Path) -> None:
    _folder("llama", tmp_path)
    with pytest.raises(UsageError, match=message):
        narrower(load(tmp_path).arch, widths)


def test_a_family_with_other_modules_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder("llama", tmp_path)
    rules = {**TransformerBlock.sharding_rules, "mlp.gate_proj": "experts"}
    monkeypatch.setattr(TransformerBlock, "sharding_rules", rules)
    text = LayerwiseText(load(tmp_path), rows()[0])
    monkeypatch.setattr(LayerwiseText, "run_layer", lambda *_: pytest.fail("measured before it was refused"))
    with pytest.raises(UsageError, match=r"mlp\.gate_proj: the widths of llama cannot be pruned"):
        choose_pruning(text, PruningRequest(text.model.arch, 2, "influence"), lambda _: None, lambda _: None)
    with pytest.raises(UsageError, match=r"mlp\.gate_proj: the widths of llama cannot be pruned"):
        _measure(load(tmp_path))
