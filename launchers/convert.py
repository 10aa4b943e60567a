"""Convert caches of other systems to this one's format.

    python -m launchers.convert --format=nemo_aligner --source='data/train_CHUNK_ID.jsonl' --model=my/student \\
        --out=my/cache/train
    python -m launchers.convert --format=jsonl --source=server_output.jsonl --model=my/student --out=my/cache/train

nemo_aligner is NeMo-Aligner's chunked JSONL: tokens, labels, loss_mask, topk_logits, topk_token_ids and, optionally,
log_sum_exp_logits. CHUNK_ID in the path stands for 0, 1, ….

jsonl is what any inference server can write, one object a line, with these fields:

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
need the tail are then refused. The conversion is one pass with one shard in memory. After an interruption it has to be
started again.
"""

from pathlib import Path
from typing import Any, cast

from absl import flags

from launchers.cli import app

FORMAT = flags.DEFINE_string("format", None, "nemo_aligner or jsonl; required.")
SOURCE = flags.DEFINE_string("source", None, "A file, a folder of .jsonl files, or a path with CHUNK_ID; required.")
OUT = flags.DEFINE_string("out", None, "Folder for the cache; required.")
MODEL = flags.DEFINE_string("model", None, "Hugging Face folder with the source's tokenizer, or hub:OWNER/NAME.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Size of the vocabulary, if there is no --model.")
CODEC = flags.DEFINE_enum("codec", "standard", ["standard", "compact", "lossless"], "How the cache is coded.")
SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 4_000_000, "About the size of a shard.")


def main() -> None:
    """Converts the source, and logs a summary of the cache."""
    from data.importers.import_cache import UNKNOWN, ImportSettings, import_cache
    from data.tokenizer import Tokenizer
    from kd_core.errors import UsageError
    from kd_core.files import damage_as_usage_error, read_json
    from kd_core.hub import resolve_folder
    from kd_core.json_fields import check_integer
    from kd_core.students.decoder.architecture import UPPER_BOUNDS

    kind, source, out = FORMAT.value, SOURCE.value, OUT.value
    if kind is None or source is None or out is None or (MODEL.value is None) == (VOCAB_SIZE.value is None):
        raise UsageError("wanted --format, --source, --out, and either --model or --vocab_size. Try --help.")
    vocab_size = columns = VOCAB_SIZE.value or 0
    tokenizer = UNKNOWN
    if MODEL.value is not None:
        folder = resolve_folder(MODEL.value, "--model")
        source_tokenizer = Tokenizer(folder)
        vocab_size, tokenizer = source_tokenizer.vocab_size, source_tokenizer.fingerprint()
        config = read_json(folder / "config.json", "a Hugging Face model configuration")
        with damage_as_usage_error(folder / "config.json", "a Hugging Face model configuration"):
            columns = check_integer(config.get("vocab_size", vocab_size), "vocab_size", 1, UPPER_BOUNDS["vocab_size"])
    job = ImportSettings(
        kind, source, vocab_size, tokenizer, cast(Any, CODEC.value), shard_bytes=SHARD_BYTES.value or 0,
        columns=max(columns, vocab_size),
    )  # fmt: skip
    manifest = import_cache(job, Path(out))
    app.log.info("%s", manifest.summary(Path(out)))
    if manifest.unknown:
        app.log.info("%s: not known from the source: %s", out, ", ".join(manifest.unknown))


if __name__ == "__main__":
    app.run_command(main, "launchers.convert", __doc__ or "")
