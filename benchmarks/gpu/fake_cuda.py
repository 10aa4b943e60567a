"""Fake CUDA tensors on a build of torch without CUDA: shapes, dtypes and devices as on a GPU, and no numbers.

`load` must run before torch is imported, so whoever uses it is a process of its own (`counts.py`). It builds
`fake_cuda.cpp`, which takes g++ and two seconds, and keeps the library in a cache folder. These are internals of torch:
`TESTED` is the version for which they are known to work.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTED = "2.13"
SOURCE = Path(__file__).with_suffix(".cpp")


def why_unavailable() -> str | None:
    """Returns why this machine has no fake CUDA tensors, or None if it has them."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "they need Linux and g++"
    installed = importlib.metadata.version("torch")
    if not installed.startswith(f"{TESTED}."):
        return f"they are tested with torch {TESTED}, and {installed} is installed"
    return None


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (no error without a home)
    folder = Path(home) / "kd-workspace"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="kd-workspace-"))
    return folder


def build() -> Path:
    """Compiles the shim for the installed torch, unless the cache folder has it, and returns the library."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    # One library for each source and each torch.
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch_folder} {importlib.metadata.version('torch')}".encode())
    library = _cache_folder() / f"fake_cuda_{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    # Several processes may build at once: each writes a file of its own, and the last rename wins.
    partial = library.with_suffix(f".{os.getpid()}.partial")
    lib = torch_folder / "lib"
    command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", str(SOURCE), f"-L{lib}",
               "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}", "-o", str(partial)]  # fmt: skip
    subprocess.run(command, check=True)
    partial.replace(library)
    return library


def load() -> None:
    """Loads the shim, or ends the process where there is none. torch must not have been imported yet."""
    if reason := why_unavailable():
        raise SystemExit(f"no fake CUDA tensors: {reason}")
    assert "torch" not in sys.modules, "the shim registers with torch when torch is loaded, so it comes first"
    ctypes.CDLL(str(build())).set_cuda_guard()
