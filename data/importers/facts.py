"""`cache.json` of a data set that was written of a cache: what its columns do not say."""

from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from data.cache.codec.rank_tables import MAX_VOCABULARY
from data.cache.manifest import Manifest
from data.cache.manifest_fields import parse_selection
from data.cache.selection import Selection
from kd_core.errors import UsageError
from kd_core.files import read_json
from kd_core.json_fields import check_integer, check_list, check_object, check_text, short_repr

FACTS_FILE, FACTS_FORMAT, FACTS_VERSION = "cache.json", "kd-workspace data set of a teacher cache", 1


def tail_column(temperature: float) -> str:
    """Returns the name of the column with the tail at a further temperature."""
    return f"tail_log_prob_at_{temperature:g}"


@dataclass(frozen=True)
class Facts:
    """Facts of a cache that the columns of its data set do not hold."""

    vocab_size: int
    tokenizer: str
    teacher: dict[str, Any]
    selection: Selection
    unknown: tuple[str, ...]

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "Facts":
        return cls(**{field.name: getattr(manifest, field.name) for field in fields(cls)})

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `cache.json`."""
        return {"format": FACTS_FORMAT, "version": FACTS_VERSION, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> "Facts":
        """Reads `cache.json`.

        Raises:
            UsageError: it is missing, of another version, or a field is wrong.
        """
        value = read_json(path, "that of a data set which launchers.convert --to=huggingface wrote")
        kind, version = value.pop("format", None), value.pop("version", None)
        try:
            if (kind, version) != (FACTS_FORMAT, FACTS_VERSION):
                raise ValueError(f"format and version are {short_repr(kind)} and {short_repr(version)}")
            facts = check_object(value, "it", (field.name for field in fields(cls)))
            return cls(
                check_integer(facts["vocab_size"], "vocab_size", 1, MAX_VOCABULARY),
                check_text(facts["tokenizer"], "tokenizer"),
                check_object(facts["teacher"], "teacher"),
                parse_selection(facts["selection"]),
                tuple(check_text(name, "unknown") for name in check_list(facts["unknown"], "unknown")),
            )
        except ValueError as error:
            raise UsageError(f"{path}: {error}. Wanted version {FACTS_VERSION} of {FACTS_FORMAT!r}.") from None


def facts_file(source: str) -> Path:
    """Returns the path of `cache.json` of a data set, which lies beside the folder of its files."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    return (folder if (folder / FACTS_FILE).exists() else folder.parent) / FACTS_FILE


@cache
def read_facts(source: str) -> Facts:
    """Reads `cache.json` of a data set."""
    return Facts.read(facts_file(source))
