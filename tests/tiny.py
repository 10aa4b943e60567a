"""A teacher, a corpus and caches that are made in a second, by the real code."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.cache.manifest import read_manifest
from data.cache.record import Record
from data.cache.selection import Selection
from data.corpus.corpus import Corpus
from data.export import export as steps
from data.export.extend import end_growth, load_growth
from data.export.plan import make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_growth, record_or_check_plan
from data.export.spool.spool_folder import remove_spool, spool_users
from data.export.teacher_export import TeacherExport
from data.stream.shards import ShardReader
from kd_core.files import json_text, write_json
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Random, build_student

ROW_LENGTH = 32
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 320


@dataclass(frozen=True)
class Tiny:
    """Where everything lies."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def train(self) -> Path:
        return self.root / "cache" / "train"

    @property
    def validation(self) -> Path:
        return self.root / "cache" / "validation"

    def records(self, folder: Path | None = None) -> list[Record]:
        """All records of a cache, the training one if none is named."""
        at = folder or self.train
        return list(ShardReader(at, read_manifest(at)).records())

    def texts(self) -> list[str]:
        """The corpus's documents."""
        return [path.read_text() for path in sorted(self.corpus.iterdir())]

    def export(self, **changes: object) -> TeacherExport:
        """The export that made the caches."""
        settings = {
            "corpus": Corpus(str(self.corpus)),
            "teacher": str(self.teacher),
            "train_tokens": None,
            "validation_tokens": None,
            "selection": Selection(top_k=8),
            "row_length": ROW_LENGTH,
            "validation_share": 0.2,
            "block_positions": 128,
            "shard_bytes": 256 * 16,
            "batch_rows": 3,
            "dtype": "float32",
        }
        return TeacherExport(**{**settings, **changes})  # type: ignore[arg-type]

    def train_items(self, steps: int = 6) -> list[str]:
        """The quick start's experiment on the tiny caches, as --config items."""
        return [
            "quickstart",
            f"student.folder={self.teacher}",
            "student.keep_layers=(0, 3)",
            f"shards.path={self.train}",
            f"evaluation.shards.path={self.validation}",
            f"collate.row_length={ROW_LENGTH}",
            f"tokens_per_step={4 * ROW_LENGTH}",
            f"steps={steps}",
            "checkpoint.every=2",
            "evaluation.every=3",
            "schedule.warmup_steps=2",
            "parallel.precision=float32",
            "parallel.micro_batch_rows=2",
        ]


def make_corpus(folder: Path, documents: int = 24) -> None:
    """Documents of a few sentences from a small vocabulary, so that a tiny model has something to learn."""
    words = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(documents):
        sentences = [
            f"The {words.choice(['old', 'young', 'loud'])} {words.choice(['fox', 'owl', 'hen'])} "
            f"{words.choice(['sees', 'hears', 'follows'])} a {words.choice(['river', 'road', 'light'])}."
            for _ in range(words.randint(2, 9))
        ]
        (folder / f"{number:03d}.txt").write_text(" ".join(sentences))


def make_tokenizer(folder: Path, texts: list[str], vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def teach(model: Decoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Plain cross-entropy on the texts, by plain torch."""
    ids = [i for text in texts for i in tokenizer.encode(text).ids]
    rows = torch.tensor(ids[: len(ids) // 33 * 33]).view(-1, 33)
    positions, documents = torch.arange(32).expand(len(rows), 32), torch.zeros(len(rows), 32, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        logits = model(rows[:, :-1], positions, documents)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_teacher(folder: Path, texts: list[str], *, tied: bool = True, vocab: int = VOCAB) -> Path:
    """A Hugging Face folder of a 4-layer Llama that has read the texts a few times."""
    folder.mkdir(parents=True)
    size = make_tokenizer(folder, texts, vocab).get_vocab_size()
    arch = Architecture(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=tied,
        max_positions=256,
    )
    write_json(folder / "config.json", config_fields(arch, 0, 0))
    model = build_student(Random(str(folder), 32, 48, 4, 4, 2, init_std=0.1), torch.device("cpu"), seed=1)
    teach(model, Tokenizer.from_file(str(folder / "tokenizer.json")), texts)
    temporary = folder.with_name(folder.name + "_made")
    save_pretrained(model, temporary, folder)
    (temporary / "model.safetensors").rename(folder / "model.safetensors")
    return folder


def make_chat_folder(tiny: Tiny, folder: Path, **settings: object) -> Path:
    """The teacher as it is published: ChatML's tokens in its tokenizer, settings beside it."""
    folder.mkdir()
    for path in tiny.teacher.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = json.loads(tokenizer.to_str())
    for place, text in ((5, "<|im_end|>"), (6, "<|im_start|>")):  # ids that stand for bytes that no text here has
        old = next(token for token, number in vocabulary["model"]["vocab"].items() if number == place)
        vocabulary["model"]["vocab"][text] = vocabulary["model"]["vocab"].pop(old)
        vocabulary["model"]["merges"] = [pair for pair in vocabulary["model"]["merges"] if old not in pair]
        vocabulary["added_tokens"].append({**vocabulary["added_tokens"][0], "id": place, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    return folder


def write_caches(export: TeacherExport, out: Path | str, ranks: int = 1, extend: bool = False) -> None:
    """Both caches, as the command writes them."""
    with spool_users(out) as users:
        plans = make_plans(export, out, load_growth(out, begin=True) if extend else None)
        for plan in plans:
            if (record_or_check_growth if extend else record_or_check_plan)(plan):
                continue
            model = steps.load_teacher(export, torch.device("cpu"))
            pilot = steps.make_tables(plan, model)
            for rank in range(ranks):
                steps.write_missing_shards(plan, model, pilot, rank, ranks)
            write_manifest(plan)
        if extend:
            end_growth(out)
        if users.is_last():
            for plan in plans:
                remove_spool(plan.windows.folder, out)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Bytes of all files under a folder; of manifests without `made`, which has the time of the day."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, payload in found.items():
        if name.endswith("manifest.json"):
            found[name] = json_text({**json.loads(payload), "made": {}}).encode()
    return found


def make_tiny(root: Path) -> Tiny:
    """Corpus, teacher and caches under `root`."""
    tiny = Tiny(root)
    make_corpus(tiny.corpus)
    make_teacher(tiny.teacher, tiny.texts())
    write_caches(tiny.export(), root / "cache")
    return tiny
