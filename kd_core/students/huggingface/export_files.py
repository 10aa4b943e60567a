"""All files of an exported folder but weights: `config.json`, tokenizer, licences and chat format."""

import fnmatch
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_core.files import damage_as_usage_error, is_plain_file, read_json, read_text, write_json, write_text
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.huggingface.config_json import config_fields

log = logging.getLogger("kd")
# Lower-case patterns of files that are copied: tokenizers of all families, and licences of the weights.
COPIED = (
    *("tokenizer*", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "generation_config.json"),
    *("licen[cs]e*", "copying*", "notice*", "*use_policy*"),
)
NAMED_TEMPLATES, TOOL_USE = "additional_chat_templates", "tool_use"
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
        tool_use: the template of conversations with tools, where that is another one.
    """

    template: str
    special_tokens: dict[str, str]
    turn_ends: dict[str, int]
    tool_use: str | None = None

    @property
    def templates(self) -> dict[str, str]:
        """Returns the templates by the names that transformers has for them."""
        return {"default": self.template} | ({TOOL_USE: self.tool_use} if self.tool_use is not None else {})

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


def _template_path(folder: Path, name: str) -> Path:
    return folder / TEMPLATE if name == "default" else folder / NAMED_TEMPLATES / f"{name}.jinja"


def _copied_templates(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the chat templates of a folder by name, as transformers finds them: files go before settings."""
    paths = {name: _template_path(folder, name) for name in ("default", TOOL_USE)}
    if files := {name: read_text(path, "a chat template") for name, path in paths.items() if path.exists()}:
        return files
    stored = settings.get("chat_template")
    with damage_as_usage_error(folder / SETTINGS, "the settings of a tokenizer"):
        is_list = isinstance(stored, list)
        return {item["name"]: item["template"] for item in stored} if is_list else {"default": stored}


def _write_templates(folder: Path, chat: ChatFormat, settings: dict[str, Any], tokenizer_folder: Path) -> None:
    """Writes the cache's templates, all of them in files, where the folder and its settings have others."""
    copied = _copied_templates(folder, settings)
    if all(copied.get(name) == template for name, template in chat.templates.items()):
        return
    settings.pop("chat_template", None)
    _template_path(folder, TOOL_USE).unlink(missing_ok=True)  # of another format
    for name, template in chat.templates.items():
        path = _template_path(folder, name)
        path.parent.mkdir(exist_ok=True)
        write_text(path, template)
    mismatch = "has no chat template" if copied.get("default") is None else "has another chat template"
    log.info("export: %s %s; the export gets that of the cache it was trained on", tokenizer_folder, mismatch)


def _write_chat(folder: Path, chat: ChatFormat, tokenizer_folder: Path) -> None:
    """Writes the templates and the special tokens over those that were copied into `folder`."""
    settings = _read_settings(folder / SETTINGS)
    _write_templates(folder, chat, settings, tokenizer_folder)
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


def write_export_files(
    folder: Path, arch: Architecture, tokenizer_folder: Path, dtype: str, chat: ChatFormat | None = None
) -> None:
    """Writes all files but weights, from those of `tokenizer_folder` and with the chat format of `chat`.

    Raises:
        UsageError: a file of `tokenizer_folder` is missing or damaged.
    """
    source = read_json(tokenizer_folder / "config.json", MODEL_CONFIG)
    _copy_files(tokenizer_folder, folder)
    # A model with images may name some in the configuration of its text model only.
    text = source.get("text_config")
    source = {**text, **source} if isinstance(text, dict) else source
    ids = {name: value for name, value in source.items() if name.endswith("_token_id")}
    if chat:
        _write_chat(folder, chat, tokenizer_folder)
        generation = _read_settings(folder / GENERATION)
        ids["eos_token_id"] = _eos_ids(chat, generation.get("eos_token_id"), ids.get("eos_token_id"))
        model_ids = {name: ids[name] for name in ("bos_token_id", "pad_token_id") if ids.get(name) is not None}
        write_json(folder / GENERATION, {**model_ids, **generation, "eos_token_id": ids["eos_token_id"]})
    # A student that writes its own configuration has done so before.
    if (path := folder / "config.json").exists():
        config = {**read_json(path, MODEL_CONFIG), **ids, "dtype": dtype}
    else:
        config = config_fields(arch, ids.get("bos_token_id"), ids.get("eos_token_id"), dtype)
        config = {**ids, **config, **{name: value for name, value in ids.items() if value is not None}}
    write_json(path, config)
