"""The numbers that fix a decoder: its shape and its arithmetic. `families.py` reads them out of a `config.json`."""

from dataclasses import dataclass, replace

from kd_core.errors import UsageError
from kd_core.students.decoder.rope import RopeScaling

# What no decoder comes near, and no process suffers from while it has shapes alone.
MOST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_layers": 4096,
    "num_heads": 1 << 14, "num_kv_heads": 1 << 14, "head_dim": 1 << 16, "max_positions": 1 << 40, "vocab_rows": 1 << 24,
}  # fmt: skip


def too_many_tokens(tokens: int, rows: int, folder: str, where: str) -> UsageError:
    """Returns the error of a model without rows for tokens that are used. `where` names the setting."""
    return UsageError(
        f"{where}: {folder} has an embedding of {rows} rows (vocab_size in config.json), and {tokens} tokens are used, "
        f"so ids from {rows} on have no row. Tokenizer and model do not belong together, or tokens were added: widen "
        "the model by resize_token_embeddings of transformers."
    )


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix a decoder's shape and arithmetic.

    `padded_vocab_size` is how many rows embedding and head have, where that is more than the real vocabulary: the
    others are no tokens. The scales are Granite's; `attention_scale` is 1/√head_dim where it is None. `windows` has
    how many positions each layer sees, its own included (None: all before it); None where every layer sees all.
    `family` is the name under which the student is saved; the arithmetic does not ask for it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    padded_vocab_size: int | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] | None = None
    rope_scaling: RopeScaling | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name}: got {getattr(self, name)!a}; wanted 1 to {most}.")
        for window in self.windows or ():
            if window is not None and not 1 <= window <= MOST["max_positions"]:
                raise UsageError(f"windows: got one of {window!a}; wanted 1 or more.")

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    def window(self, layer: int) -> int | None:
        """How many positions a layer sees; None: all."""
        return None if self.windows is None else self.windows[layer]

    def with_tokens(self, tokens: int, folder: str) -> "Architecture":
        """Returns the same rows, of which the `tokens` of the folder's tokenizer are real and the others padding.

        Where a setting has said the real vocabulary already, that one counts. A tokenizer may have more tokens than
        there are rows, such as a padding token that was added and is in no text. Then all rows are real.

        Raises:
            UsageError: the setting leaves out tokens that have rows.
        """
        tokens = min(tokens, self.vocab_rows)
        if self.padded_vocab_size is None:
            padded = self.vocab_size if tokens < self.vocab_size else None
            return replace(self, vocab_size=tokens, padded_vocab_size=padded)
        if self.vocab_size < tokens:
            raise UsageError(
                f"student.vocab_size: got {self.vocab_size}; wanted at least the {tokens} tokens of the tokenizer in "
                f"{folder}, which count where it is not set."
            )
        return self

    def with_layers(self, kept: tuple[int, ...]) -> "Architecture":
        """Only these layers, in this order."""
        windows = None if self.windows is None else tuple(self.windows[layer] for layer in kept)
        return replace(self, num_layers=len(kept), windows=windows)
