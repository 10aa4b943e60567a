"""Convert caches of other systems to this one's format, and a cache to a Hugging Face data set.

    python -m launchers.convert --format=distillkit --source=captures/ --model=my/student --out=my/cache/train
    python -m launchers.convert --format=megatron --source=logits/ --tokens=tokens.npy --model=my/student \\
        --out=my/cache/train
    python -m launchers.convert --format=nemo_aligner --source='data/train_CHUNK_ID.jsonl' --model=my/student \\
        --out=my/cache/train
    python -m launchers.convert --to=huggingface --source=my/cache/train --out=my/dataset

--source is a file, a folder, or a path with CHUNK_ID, which stands for 0, 1, …. Formats:

    distillkit     Parquet of DistillKit's captures, also packed, of today's codec and the legacy one.
                   --compression names its configuration, if no compression_config.yaml lies beside the rows
    megatron       tars of Megatron-LM's offline logits, V1 and V2. They have no tokens: --tokens names an .npy of
                   [samples, T + 1] ids in the order of its samples, and --loss_mask one of [samples, T] zeros and ones
    nemo_aligner   NeMo-Aligner's chunked JSONL
    axolotl        rows that `axolotl preprocess` leaves, as JSON lines or Parquet
    trl            prompt_ids, completion_ids, logprobs and logprob_token_ids, as TRL's client of a vLLM teacher returns
    vllm           replies of vLLM's server with prompt_logprobs and prompt_token_ids, one a line
    llamakd        rows of codys12/LlamaKD: inputs [L] and targets [L, 2, K]
    huggingface    a data set that --to=huggingface wrote
    jsonl          what any inference server can write, one object a line, with these fields:

        tokens                    T + 1 ids
        top_ids, top_log_probs    T rows: true log-probabilities of token t + 1 after tokens 0 … t, any number in a row
        loss_mask                 optional: T times 0 or 1
        label_log_probs           optional: T numbers
        document                  optional: a name

--model is a Hugging Face folder with the tokenizer that the source was made with. Its vocabulary and fingerprint go
into the cache, and a student with another tokenizer is refused. Entries beyond the tokenizer, which stand for padding
of the model's vocabulary, are left out, and the probabilities of the others are divided by what remains. Without
--model, --vocab_size is the number of tokens.

The manifest lists as unknown what the source lacks: the tail, the tokenizer, labels' log-probabilities. Losses that
need the tail are then refused. --values=logits or log_probs says what the source's numbers are where its format leaves
that open. After an interruption, the same command goes on. docs/conversion.md says what each format states.
"""

import os
from pathlib import Path
from typing import Any, cast

from absl import flags

from launchers.cli import app

FORMAT = flags.DEFINE_string("format", None, "Format of the source, one of those above.")
TO = flags.DEFINE_enum("to", None, ["huggingface"], "Writes a Hugging Face data set of the cache --source.")
SOURCE = flags.DEFINE_string("source", None, "A file, a folder, or a path with CHUNK_ID; required.")
OUT = flags.DEFINE_string("out", None, "Folder for the cache or the data set; required.")
MODEL = flags.DEFINE_string("model", None, "Hugging Face folder with the source's tokenizer, or hub:OWNER/NAME.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Size of the vocabulary, if there is no --model.")
VALUES = flags.DEFINE_enum(
    "values", "auto", ["auto", "log_probs", "logits"], "What the source's numbers are, if not what its format says."
)
TOKENS = flags.DEFINE_string("tokens", "", "The .npy with the tokens of each sample (megatron).")
LOSS_MASK = flags.DEFINE_string("loss_mask", "", "The .npy with the loss mask of each sample (megatron).")
COMPRESSION = flags.DEFINE_string("compression", "", "DistillKit's configuration of its codec (distillkit).")
CODEC = flags.DEFINE_enum("codec", "standard", ["standard", "compact", "lossless"], "How the cache is coded.")
SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 4_000_000, "About the size of a shard.")
PROCESSES = flags.DEFINE_integer(
    "processes", 0, "Processes side by side; 0 is one for each core. The bytes are the same.", lower_bound=0
)


def _tokenizer_facts() -> tuple[int, int, str]:
    """Returns the vocabulary of --model or --vocab_size, the columns of the model, and the tokenizer's fingerprint."""
    from data.importers.settings import UNKNOWN
    from data.tokenizer import Tokenizer
    from kd_core.files import damage_as_usage_error, read_json
    from kd_core.hub import resolve_folder
    from kd_core.json_fields import check_integer
    from kd_core.students.decoder.architecture import UPPER_BOUNDS

    if MODEL.value is None:
        return VOCAB_SIZE.value or 0, VOCAB_SIZE.value or 0, UNKNOWN
    folder = resolve_folder(MODEL.value, "--model")
    tokenizer = Tokenizer(folder)
    config = read_json(folder / "config.json", "a Hugging Face model configuration")
    with damage_as_usage_error(folder / "config.json", "a Hugging Face model configuration"):
        size = config.get("vocab_size", tokenizer.vocab_size)
        columns = check_integer(size, "vocab_size", 1, UPPER_BOUNDS["vocab_size"])
    return tokenizer.vocab_size, max(columns, tokenizer.vocab_size), tokenizer.fingerprint()


def _import_cache(source: str, out: Path, processes: int) -> None:
    """Converts the source, and logs a summary of the cache."""
    from data.importers.facts import read_facts
    from data.importers.import_cache import import_cache
    from data.importers.settings import ImportSettings
    from kd_core.errors import UsageError

    if FORMAT.value == "huggingface" and MODEL.value is None and VOCAB_SIZE.value is None:
        facts = read_facts(source)
        vocab_size, columns, tokenizer = facts.vocab_size, facts.vocab_size, facts.tokenizer
    elif (MODEL.value is None) == (VOCAB_SIZE.value is None):
        raise UsageError("wanted either --model or --vocab_size. Try --help.")
    else:
        vocab_size, columns, tokenizer = _tokenizer_facts()
    job = ImportSettings(
        str(FORMAT.value), source, vocab_size, tokenizer, cast(Any, CODEC.value), shard_bytes=SHARD_BYTES.value or 0,
        columns=columns, values=cast(Any, VALUES.value), tokens=TOKENS.value or "", loss_mask=LOSS_MASK.value or "",
        compression=COMPRESSION.value or "",
    )  # fmt: skip
    manifest = import_cache(job, out, processes)
    app.log.info("%s", manifest.summary(out))
    if manifest.unknown:
        app.log.info("%s: not known from the source: %s", out, ", ".join(manifest.unknown))


def main() -> None:
    """Converts in the direction that the flags name."""
    from data.importers.write_dataset import write_dataset
    from data.storage.storage import is_url
    from kd_core.errors import UsageError

    source, out = SOURCE.value, OUT.value
    if source is None or out is None or (FORMAT.value is None) == (TO.value is None):
        raise UsageError("wanted --source, --out, and either --format or --to. Try --help.")
    import_flags = (MODEL, VOCAB_SIZE, VALUES, TOKENS, LOSS_MASK, COMPRESSION, CODEC, SHARD_BYTES)
    if TO.value is not None and (unused := [f"--{flag.name}" for flag in import_flags if flag.present]):
        raise UsageError(f"{', '.join(unused)}: not for --to={TO.value}. Leave it out.")
    if is_url(out):
        raise UsageError("--out: got a URL; convert writes folders. Copy the folder to the bucket afterwards.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = PROCESSES.value or cores or 1
    if TO.value is None:
        _import_cache(source, Path(out), processes)
    else:
        app.log.info("%s", write_dataset(source, Path(out), processes))


if __name__ == "__main__":
    app.run_command(main, "launchers.convert", __doc__ or "")
