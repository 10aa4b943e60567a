"""Datasets of the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION][/PATH]`, read through its web server.

Files are listed through huggingface_hub (extra `hf`). The token is that of the environment, or of `hf auth login`.
"""

import os
import re
from typing import Any

from data.storage.object_storage import WebStorage, is_loopback, open_web_client
from kd_core.errors import UsageError

DATASET = re.compile(r"hf://datasets/([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(?:@([A-Za-z0-9._-]+))?(?:/([^@]*))?")
HUB = "https://huggingface.co"


def _token() -> str | None:
    try:
        from huggingface_hub import get_token  # noqa: PLC0415 (an extra)
    except ImportError:
        return os.environ.get("HF_TOKEN")
    return get_token()


class HubStorage(WebStorage):
    """A folder of a dataset on the hub, at one revision. It cannot be written."""

    def __init__(self, url: str, retry_seconds: float) -> None:
        match = DATASET.fullmatch(url)
        if match is None:
            raise UsageError(f"{url}: wanted hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME@REVISION/PATH.")
        super().__init__(url, retry_seconds)
        dataset, revision, path = match.groups()
        self.dataset, self.revision, self.path = dataset, revision or "main", (path or "").strip("/")
        self.endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")

    def open(self) -> Any:
        if not self.endpoint.startswith("https://") and not is_loopback(self.endpoint):
            raise UsageError("HF_ENDPOINT: wanted an https:// URL; a token is not sent over plain http. Change it.")
        url = f"{self.endpoint}/datasets/{self.dataset}/resolve/{self.revision}/{self.path}".rstrip("/")
        headers = {"authorization": f"Bearer {token}"} if (token := _token()) else {}
        return open_web_client(url, {"default_headers": headers, "allow_http": is_loopback(self.endpoint)})

    def names(self) -> list[str]:
        try:
            from huggingface_hub import HfApi, RepoFile  # noqa: PLC0415 (an extra)
        except ImportError:
            raise UsageError(f"{self.base}: to list files, pip install 'kd-workspace[hf]'.") from None
        try:
            entries = HfApi(endpoint=self.endpoint, token=_token() or False).list_repo_tree(
                self.dataset, self.path or None, revision=self.revision, repo_type="dataset"
            )
            return sorted(entry.path.rpartition("/")[2] for entry in entries if isinstance(entry, RepoFile))
        except Exception as error:  # errors of the client and the network, whose text may hold a URL with a signature
            raise UsageError(
                f"{self.base}: the hub does not list it ({type(error).__name__}). Check its name, the connection and "
                "HF_TOKEN."
            ) from None
