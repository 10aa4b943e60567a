"""Our decoder against transformers, on random weights; the real teacher is in tests/test_real_teacher.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.files import write_json
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Pretrained, Random, build_student
from kd_core.training.generation import continue_greedily
from tests.tiny import Tiny, make_teacher

TOLERANCE = 1e-5


def _rows(vocab: int, B: int = 2, T: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.int64)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(tmp_path: Path, tied: bool) -> None:

    folder = make_teacher(tmp_path / "teacher", ["some text to train a tokenizer on"] * 20, tied=tied)
    ours = build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, positions, documents = _rows(ours.arch.vocab_size)
    with torch.no_grad():
        assert (ours(tokens, positions, documents) - theirs(tokens).logits).abs().max() < TOLERANCE


def test_granite_multiplies_and_divides_as_transformers_does(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher", ["some text to train a tokenizer on"] * 20)
    llama = build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)
    arch = replace(
        llama.arch, family="granite", embedding_scale=6.0, attention_scale=0.2, residual_scale=0.22, logit_scale=1 / 8
    )
    write_json(folder / "config.json", config_fields(arch, 0, 0))
    ours = build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)
    assert ours.arch == arch
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "GraniteForCausalLM"
    tokens, positions, documents = _rows(arch.vocab_size)
    with torch.no_grad():
        found = ours(tokens, positions, documents)
        assert (found - theirs(tokens).logits).abs().max() < TOLERANCE
        # What scores a teacher multiplies itself.
        assert torch.equal(ours(tokens, positions, documents, lambda hidden, weight: hidden @ weight.t()), found)
        assert (found - llama(tokens, positions, documents)).abs().max() > 0.1


def test_rows_beyond_the_real_vocabulary_are_no_tokens(tiny: Tiny, tmp_path: Path) -> None:
    """They are kept in the weights, and enter neither logits nor a continuation."""
    rows = Pretrained(str(tiny.teacher)).architecture().vocab_size
    start = Pretrained(str(tiny.teacher), vocab_size=rows - 3)
    padded, whole = (
        build_student(each, torch.device("cpu"), seed=0) for each in (start, Pretrained(str(tiny.teacher)))
    )
    tokens, positions, documents = _rows(rows - 3)
    with torch.no_grad():
        assert torch.equal(padded(tokens, positions, documents), whole(tokens, positions, documents)[..., : rows - 3])
        padded.lm_head.weight[rows - 3 :] = 100 * padded.norm.weight
    assert max(continue_greedily(padded, [[1, 2, 3]], 4, Parallel(precision="float32"), World())[0]) < rows - 3
    save_pretrained(padded, tmp_path / "export", tiny.teacher)
    assert Pretrained(str(tmp_path / "export"), vocab_size=rows - 3).architecture() == padded.arch
    with pytest.raises(UsageError, match=r"student\.vocab_size"):
        Pretrained(str(tiny.teacher), vocab_size=rows + 1).architecture()


def test_an_exported_folder_gives_transformers_the_same_student_and_tokenizer(tiny: Tiny, tmp_path: Path) -> None:

    ours = build_student(Pretrained(str(tiny.teacher), keep_layers=(0, 2, 3)), torch.device("cpu"), seed=0)
    save_pretrained(ours, tmp_path / "export", tiny.teacher)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = torch.tensor([tokenizer.encode("The old fox sees a river.")])
    T = ids.shape[1]
    with torch.no_grad():
        own = ours(ids, torch.arange(T)[None], torch.zeros(1, T, dtype=torch.int64))
        assert (own - theirs(ids).logits).abs().max() < TOLERANCE


def test_a_packed_document_sees_nothing_of_its_neighbours(tiny: Tiny) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    tokens, _, _ = _rows(model.arch.vocab_size, B=1)
    lengths = [1, 9, 14]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = model(tokens, positions, documents)
        alone = [
            model(part, torch.arange(part.shape[1])[None], torch.zeros_like(part)) for part in tokens.split(lengths, 1)
        ]
    assert (packed - torch.cat(alone, dim=1)).abs().max() < TOLERANCE


def test_a_position_depends_on_no_later_token_and_on_no_other_document(tiny: Tiny) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    tokens, positions, _ = _rows(model.arch.vocab_size, B=1, T=10)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    embedded = model.embed_tokens(tokens).detach().requires_grad_()
    model.embed_tokens.forward = lambda _: embedded  # type: ignore[method-assign]
    model(tokens, positions, documents)[0, 6].sum().backward()
    reached = embedded.grad[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_documents_are_the_runs_of_equal_ids() -> None:
    whole = Documents.from_ids(torch.zeros(3, 5, dtype=torch.int64))
    assert whole.whole_rows
    assert whole.lengths == (5, 5, 5)
    assert Documents.one_a_row(torch.empty(3, 5, dtype=torch.int64)).lengths == whole.lengths
    packed = Documents.from_ids(torch.tensor([[0, 0, 1], [1, 1, -1], [0, 1, 2]]))
    assert not packed.whole_rows
    assert packed.lengths == (2, 1, 2, 1, 1, 1, 1)
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 5, 6, 7, 8, 9, 9]  # empty documents up to a power of two
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.longest == 3


@pytest.mark.parametrize(("longest", "bound"), [(1, 128), (128, 128), (129, 256), (600, 1000), (1000, 1000)])
def test_the_bound_of_lengths_takes_few_values(longest: int, bound: int) -> None:
    ids = (torch.arange(1000) // longest)[None]
    assert Documents.from_ids(ids).longest == bound


def test_random_weights_depend_on_seed_and_name_alone(tiny: Tiny) -> None:
    start = Random(str(tiny.teacher), 16, 24, 2, 2, 1)
    one, same, other = (build_student(start, torch.device("cpu"), seed) for seed in (1, 1, 2))
    assert torch.equal(one.layers[1].mlp.up_proj.weight, same.layers[1].mlp.up_proj.weight)
    assert not torch.equal(one.layers[1].mlp.up_proj.weight, other.layers[1].mlp.up_proj.weight)
    assert not torch.equal(one.layers[0].mlp.up_proj.weight, one.layers[1].mlp.up_proj.weight)


def test_bad_layers_are_refused_with_what_there_is(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="different layers of 0 to 3"):
        Pretrained(str(tiny.teacher), keep_layers=(0, 4)).architecture()


def test_damaged_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for file in tiny.teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="damaged weights"):
        build_student(Pretrained(str(tmp_path)), torch.device("cpu"), seed=0)


def test_another_family_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny.teacher / "config.json").read_text().replace('"llama"', '"mamba"'))
    with pytest.raises(UsageError, match="model_type is 'mamba'"):
        Pretrained(str(tmp_path)).architecture()
