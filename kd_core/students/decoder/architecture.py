"""The architecture of a decoder: its shape and its arithmetic. `huggingface/config_json.py` reads it from a file."""

import math
from dataclasses import dataclass, replace

from kd_core.errors import UsageError
from kd_core.students.decoder.rope import LongRopeScaling, RopeScaling, RotaryPairs

# Upper bounds for untrusted configurations: above any real decoder, and harmless while a model has only shapes.
UPPER_BOUNDS = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_layers": 4096,
    "num_heads": 1 << 14, "num_kv_heads": 1 << 14, "head_dim": 1 << 16, "max_positions": 1 << 40, "vocab_rows": 1 << 24,
}  # fmt: skip


def too_many_tokens(tokens: int, rows: int, folder: str, where: str) -> UsageError:
    """Returns the error for a model whose embedding has fewer rows than tokens are used. `where` names the setting."""
    return UsageError(
        f"{where}: {folder} has an embedding of {rows} rows (vocab_size in config.json), and {tokens} tokens are used, "
        f"so ids from {rows} on have no row. Tokenizer and model do not belong together, or tokens were added. Widen "
        "the model with resize_token_embeddings of transformers."
    )


@dataclass(frozen=True)
class ExpertSettings:
    """Shape and arithmetic of a mixture of experts.

    Args:
        count: experts of a layer.
        per_token: experts of a position.
        size: hidden width of an expert. None: `intermediate_size`.
        normalised: the weights of a position's experts add up to 1, by a softmax over them alone.
    """

    count: int
    per_token: int
    size: int | None = None
    normalised: bool = True

    def __post_init__(self) -> None:
        for name, most in (("count", 1 << 16), ("per_token", self.count), ("size", UPPER_BOUNDS["intermediate_size"])):
            if (value := getattr(self, name)) is not None and not 1 <= value <= most:
                raise UsageError(f"experts.{name}: got {value!a}; wanted 1 to {most}.")


@dataclass(frozen=True)
class Architecture:
    """Shape and arithmetic of a decoder.

    Args:
        padded_vocab_size: rows of embedding and lm_head, where they are more than the real vocabulary. Rows beyond
            `vocab_size` stand for no token.
        embedding_scale: factor on embeddings. This and the other scales are Granite's.
        root_scaled_embedding: multiply embeddings by √hidden_size too, rounded to their dtype (Gemma).
        attention_scale: factor on the products of queries and keys. None: 1/√head_dim.
        windows: for each layer, how many positions a position attends to, itself included (None: all before it).
            None for the whole tuple: no layer has a window.
        rotary_share: share of an attention head's channels, the first ones, that RoPE rotates.
        rotary_pairs: which of these channels are a pair.
        rope_layers: for each layer, whether it has RoPE. None: all have.
        experts: those that a layer's feed-forward is made of, but for `dense_layers`. None: every layer has one of
            `intermediate_size`.
        attention_sinks: attention has a learnt logit of each head beside those of positions (gpt-oss).
        local_rope_theta: theta of layers with a window, which no scaling stretches (Gemma 3). None: that of all layers.
        norm_offset: added to the weights of norms (Gemma: 1).
        attention_soft_cap: bound c of the products of queries and keys, which become c · tanh(products / c) (Gemma 2).
        logit_soft_cap: the same for logits.
        family: the `model_type` under which the student is saved. It does not change the arithmetic.
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
    rotary_share: float = 1.0
    rotary_pairs: RotaryPairs = "halves"
    rope_layers: tuple[bool, ...] | None = None
    experts: ExpertSettings | None = None
    dense_layers: tuple[int, ...] = ()
    attention_sinks: bool = False
    root_scaled_embedding: bool = False
    local_rope_theta: float | None = None
    norm_offset: float = 0.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        # Refuse sizes that only a damaged or hostile configuration has.
        for name, most in UPPER_BOUNDS.items():
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name}: got {getattr(self, name)!a}; wanted 1 to {most}.")
        self._check_scales()
        self._check_rope()
        for window in self.windows or ():
            if window is not None and not 1 <= window <= UPPER_BOUNDS["max_positions"]:
                raise UsageError(f"windows: got one of {window!a}; wanted 1 or more.")

    def _check_rope(self) -> None:
        if not 0 < self.rotary_share <= 1 or self.rotary_dim == 0:
            raise UsageError(f"rotary_share: got {self.rotary_share!a}; wanted above 0, to 1.")
        if self.rotary_dim % 2:
            raise UsageError(
                f"head_dim: got {self.head_dim}, of which RoPE rotates {self.rotary_dim} channels; wanted an even "
                "number, as they turn in pairs."
            )
        if isinstance(self.rope_scaling, LongRopeScaling):
            factors = {len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)}
            if factors != {self.rotary_dim // 2}:
                raise UsageError(
                    f"LongRoPE: got {sorted(factors)} factors; wanted {self.rotary_dim // 2}, one for each pair of an "
                    "attention head's channels that RoPE rotates."
                )

    def _check_scales(self) -> None:
        for name in ("attention_scale", "attention_soft_cap", "logit_soft_cap"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}: got {value!a}; wanted a finite number above 0.")

    @property
    def vocab_rows(self) -> int:
        """Counts the rows of embedding and lm_head, padding included."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    def window(self, layer: int) -> int | None:
        """Returns how many positions a layer attends to, or None for all."""
        return None if self.windows is None else self.windows[layer]

    @property
    def rotary_dim(self) -> int:
        """Counts the channels of an attention head that RoPE rotates."""
        return int(self.head_dim * self.rotary_share)

    def has_rope(self, layer: int) -> bool:
        """Checks whether a layer rotates queries and keys."""
        return self.rope_layers is None or self.rope_layers[layer]

    @property
    def longest_document(self) -> int | None:
        """Returns how many positions a document may have, or None without a limit."""
        return self.rope_scaling.original_positions if isinstance(self.rope_scaling, LongRopeScaling) else None

    def check_length(self, positions: int, where: str) -> None:
        """Raises a `UsageError` if a document may not have so many positions. `where` names it in the message."""
        if self.longest_document is not None and positions > self.longest_document:
            raise UsageError(
                f"{where}: got a document of {positions} positions; wanted at most {self.longest_document}, for "
                "LongRoPE has other angles in longer ones."
            )

    def rope(self, layer: int) -> tuple[float, RopeScaling | None]:
        """Returns theta and scaling of a layer."""
        if self.local_rope_theta is not None and self.window(layer) is not None:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    def with_tokens(self, tokens: int, folder: str) -> "Architecture":
        """Returns the same vocabulary rows, where the first `tokens` are real and the rest is padding.

        `tokens` is the number of tokens of the folder's tokenizer. If a setting has fixed the real vocabulary already,
        the setting wins. A tokenizer may have more tokens than there are rows, such as an added padding token that is
        in no text. Then all rows are real.

        Raises:
            UsageError: the setting leaves out tokens that have rows.
        """
        # Tokens beyond the last row are in no text.
        tokens = min(tokens, self.vocab_rows)
        # Without a setting, rows beyond the tokenizer's tokens become padding.
        if self.padded_vocab_size is None:
            padded = self.vocab_size if tokens < self.vocab_size else None
            return replace(self, vocab_size=tokens, padded_vocab_size=padded)
        # With a setting, it must cover all tokens that have rows.
        if self.vocab_size < tokens:
            raise UsageError(
                f"student.vocab_size: got {self.vocab_size}; wanted at least the {tokens} tokens of the tokenizer in "
                f"{folder}, which count where it is not set."
            )
        return self

    def with_layers(self, layers: tuple[int, ...]) -> "Architecture":
        """Returns the architecture with only these layers, in this order."""
        # A layer keeps its own window and its RoPE.
        windows = None if self.windows is None else tuple(self.windows[layer] for layer in layers)
        ropes = None if self.rope_layers is None else tuple(self.rope_layers[layer] for layer in layers)
        windows = windows if any(windows or ()) else None
        dense = tuple(new for new, stored in enumerate(layers) if stored in self.dense_layers)
        return replace(self, num_layers=len(layers), windows=windows, rope_layers=ropes, dense_layers=dense)
