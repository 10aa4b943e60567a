"""All files of an exported folder but weights: `config.json`, tokenizer, licences and chat format."""

import fnmatch
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_core.files import damaged, is_plain_file, read_json, read_text, write_json, write_text
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.huggingface.config_json import config_of

log = logging.getLogger("kd")
# Lower-case patterns of files that are copied: tokenizers of all families, and licences of the weights.
COPIED = (
    *("tokenizer*", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "generation_config.json"),
    *("licen[cs]e*", "copying*", "notice*", "*use_policy*"),
)
NAMED_TEMPLATES = "additional_chat_templates"
TEMPLATE, SETTINGS, TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
MODEL_CONFIG = "a Hugging Face model configuration"


@dataclass(frozen=True)
class ChatFormat:
    """Format of the conversations that a student was trained on.

    Args:
        template: the chat template.
        special_tokens: texts of the special tokens that the template names, such as `bos_token`.
        turn_ends: ids, by text, of the tokens that end the assistant's turns, the most frequent first.
    """

    template: str
    special_tokens: dict[str, str]
    turn_ends: dict[str, int]

    @property
    def tokenizer_tokens(self) -> dict[str, str]:
        """Returns the special tokens of the tokenizer by role.

        `eos_token` is the most frequent end of a turn, unless the template names another one.
        """
        ends = {"eos_token": next(iter(self.turn_ends))} if self.turn_ends else {}
        return {**ends, **self.special_tokens}


def _copy_files(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in COPIED) and is_plain_file(path):
            (folder / path.name).write_bytes(path.read_bytes())
    named = [path for path in sorted((source / NAMED_TEMPLATES).glob("*.jinja")) if is_plain_file(path)]
    if named:
        (folder / NAMED_TEMPLATES).mkdir()
    for path in named:
        (folder / NAMED_TEMPLATES / path.name).write_bytes(path.read_bytes())


def _read_settings(path: Path) -> dict[str, Any]:
    return read_json(path, "settings of a tokenizer") if path.exists() else {}


def _default_template(folder: Path, settings: dict[str, Any]) -> Any:
    """Returns the default chat template of a folder, as transformers finds it."""
    if (folder / TEMPLATE).exists():
        return read_text(folder / TEMPLATE, "a chat template")
    stored = settings.get("chat_template")
    with damaged(folder / SETTINGS, "the settings of a tokenizer"):
        return (
            {item["name"]: item["template"] for item in stored}.get("default") if isinstance(stored, list) else stored
        )


def _write_chat(folder: Path, chat: ChatFormat, tokenizer_folder: Path) -> None:
    """Writes the template and the special tokens over those that were copied into `folder`."""
    settings = _read_settings(folder / SETTINGS)
    copied = _default_template(folder, settings)
    if copied != chat.template:
        settings.pop("chat_template", None)
        write_text(folder / TEMPLATE, chat.template)
        mismatch = "has no chat template" if copied is None else "has another chat template"
        log.info("export: %s %s; the export gets that of the cache it was trained on", tokenizer_folder, mismatch)
    for name, tokens in ((SETTINGS, settings), (TOKENS, _read_settings(folder / TOKENS))):
        for role, text in chat.tokenizer_tokens.items():
            value = tokens.get(role)
            if (value.get("content") if isinstance(value, dict) else value) != text and (name == SETTINGS or tokens):
                tokens[role] = text
        if tokens:
            write_json(folder / name, tokens)


def _eos_ids(chat: ChatFormat | None, *model_ids: Any) -> int | list[int] | None:
    """Returns the ids that end a generation: those of the turn first, then those of the model."""
    end_ids = list(chat.turn_ends.values()) if chat else []
    for ids in model_ids:
        end_ids += [] if ids is None else ids if isinstance(ids, list) else [ids]
    unique = list(dict.fromkeys(end_ids))
    return unique[0] if len(unique) == 1 else unique or None


def write_about(
    folder: Path, arch: Architecture, tokenizer_folder: Path, dtype: str, chat: ChatFormat | None = None
) -> None:
    """Writes all files but weights, from those of `tokenizer_folder` and with the chat format of `chat`.

    Raises:
        UsageError: a file of `tokenizer_folder` is missing or damaged.
    """
    source = read_json(tokenizer_folder / "config.json", MODEL_CONFIG)
    _copy_files(tokenizer_folder, folder)
    ids = {name: value for name, value in source.items() if name.endswith("_token_id")}
    if chat:
        _write_chat(folder, chat, tokenizer_folder)
        generation = _read_settings(folder / GENERATION)
        ids["eos_token_id"] = _eos_ids(chat, generation.get("eos_token_id"), ids.get("eos_token_id"))
        model_ids = {name: ids[name] for name in ("bos_token_id", "pad_token_id") if ids.get(name) is not None}
        write_json(folder / GENERATION, {**model_ids, **generation, "eos_token_id": ids["eos_token_id"]})
    config = config_of(arch, ids.get("bos_token_id"), ids.get("eos_token_id"), dtype)
    write_json(folder / "config.json", {**ids, **config})
