"""Bytes of the tokens of a vocabulary that is not byte-level."""

from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from data.tokenizer import Tokenizer


def test_a_space_as_a_bar_and_bytes_by_their_number(tmp_path: Path) -> None:
    lone = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = {letter: 256 + i for i, letter in enumerate("▁foxé")}
    fast = FastTokenizer(models.BPE({**lone, **letters}, [], byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("fox fox", "é 東 fox"):
        ids = tokenizer.encode([text])[0]
        assert int(tokenizer.byte_lengths()[torch.tensor(ids)].sum()) == len(text.encode())
