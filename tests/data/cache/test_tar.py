"""Tars: ours are anybody's; of anybody's, only plain files with plain names are read."""

import contextlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cache.tar import END_OF_TAR, RECORD_BYTES, encode_member, encode_tar, padded_size, read_members

CONTENT = [
    ("00000000.json", b"{}"),
    ("00000000.tokens.zst", b"x" * 512),
    ("00000001.json", b""),
    ("a-b_c.x1", b"y" * 999),
]


def test_python_and_gnu_tar_read_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(encode_tar(CONTENT))
    with tarfile.open(path) as tar:
        assert [(member.name, tar.extractfile(member).read()) for member in tar] == CONTENT
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [name for name, _ in CONTENT]
    assert listed.stderr == ""
    subprocess.run(["tar", "xf", str(path), "-C", str(tmp_path)], check=True)
    assert all((tmp_path / name).read_bytes() == payload for name, payload in CONTENT)


@given(payloads=st.lists(st.binary(max_size=1200), max_size=4))
def test_members_come_back(payloads: list[bytes]) -> None:
    data = encode_tar((f"{i:08d}.json", payload) for i, payload in enumerate(payloads))
    found = list(read_members(data))
    assert [member.payload for member in found] == payloads
    assert all(data[member.offset :].startswith(member.name.encode()) for member in found)


@pytest.mark.parametrize(
    "name", ["", "a", "../a.json", "/a.json", "a/b.json", "a.json/", "a b.json", "ä.json", "a" * 61 + ".x"]
)
def test_no_other_name_is_written(name: str) -> None:
    with pytest.raises(AssertionError):
        encode_member(name, b"")


def _info(
    name: str = "a.json", payload: bytes = b"12345", form: int = tarfile.USTAR_FORMAT, **changes: object
) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(form) + payload + bytes(padded_size(len(payload)) - len(payload))


def _python(name: str, form: int, **changes: object) -> bytes:
    """A member as Python's tarfile writes it, long names and all."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        info = tarfile.TarInfo(name)
        for field, value in changes.items():
            setattr(info, field, value)
        tar.addfile(info)
    return out.getvalue()


def _header(change: Callable[[bytearray], None]) -> bytes:
    """A member whose header was changed and its checksum made right again."""
    data = bytearray(_info())
    change(data)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:RECORD_BYTES])
    return bytes(data)


def _put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + len(value)] = value

    return change


PLAIN = encode_member("a.json", b"12345")
BAD = {
    "a symbolic link": (_info(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "has type b'2'"),
    "a hard link": (_info(type=tarfile.LNKTYPE, linkname="b.json"), "has type b'1'"),
    "a character device": (_info(payload=b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "has type b'3'"),
    "a block device": (_info(payload=b"", type=tarfile.BLKTYPE, devmajor=8), "has type b'4'"),
    "a folder": (_info(payload=b"", type=tarfile.DIRTYPE), "has type b'5'"),
    "a pipe": (_info(payload=b"", type=tarfile.FIFOTYPE), "has type b'6'"),
    "a contiguous file": (_info(type=tarfile.CONTTYPE), "has type b'7'"),
    "a sparse file": (_info(type=tarfile.GNUTYPE_SPARSE), "has type b'S'"),
    "a pax header": (_python("ä.json", tarfile.PAX_FORMAT), "has type b'x'"),
    "a global pax header": (_info(type=tarfile.XGLTYPE), "has type b'g'"),
    "sparse in pax": (_python("a.json", tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.size": "1"}), "has type b'x'"),
    "a long name": (_python("a" * 150 + ".json", tarfile.GNU_FORMAT), "has type b'L'"),
    "a long link": (_python("a.json", tarfile.GNU_FORMAT, linkname="b" * 150), "has type b'K'"),
    "a name with a prefix": (_python("f" * 90 + "/" + "a" * 50 + ".json", tarfile.USTAR_FORMAT), "wanted a plain name"),
    "a path upwards": (_info("../../a.json"), "wanted a plain name"),
    "an absolute path": (_info("/folder/a.json"), "wanted a plain name"),
    "a folder's name": (_info("a.json/", payload=b"", type=tarfile.AREGTYPE), "has type b'5'"),
    "a name with a line break": (_info("a\n.json"), "wanted a plain name"),
    "a name of other letters": (_info("ä.json"), "not the header"),
    "no name": (_info(""), "wanted a plain name"),
    "a size in base 256": (_header(_put(124, b"\x80" + bytes(10) + b"\x05")), "fields that a plain file does not have"),
    "a negative size": (_header(_put(124, b"\xff" * 11 + b"\xfb")), "declares -5 bytes"),
    "a size of 8 GB": (_header(_put(124, b"77777777777\0")), "declares 8589934591 bytes; 512 follow"),
    "a size beyond any": (_header(_put(124, b"\x80" + b"\xff" * 11)), "declares .* bytes|overflow|fields"),
    "a size that is no number": (_header(_put(124, b"hello there!")), "not the header"),
    "bytes behind the name": (_header(_put(90, b"x")), "fields that a plain file does not have"),
    "a link's name in a plain file": (_info(linkname="x"), "fields that a plain file does not have") ,
    "bytes behind the header's fields": (_header(_put(505, b"x")), "fields that a plain file does not have"),
    "a wrong checksum": (PLAIN[:10] + b"x" + PLAIN[11:], "bad checksum"),
    "padding that is not empty": (PLAIN[:-1] + b"x", "padding is not empty"),
    "a payload cut off": (PLAIN[:-RECORD_BYTES], "declares 5 bytes; 0 follow"),
    "a header cut off": (PLAIN + PLAIN[:100], "not the header"),
    "bytes behind the end": (PLAIN + END_OF_TAR + PLAIN, "the tar ends, but"),
    "a byte behind the end": (PLAIN + END_OF_TAR + b"x", "the tar ends, but"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_all_else_is_refused(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        list(read_members(data))


@given(data=st.binary(max_size=1100))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        list(read_members(data))


@given(at=st.integers(0, 8 * len(PLAIN) - 1))
def test_any_flipped_bit_of_header_and_padding_is_refused(at: int) -> None:
    data = bytearray(PLAIN)
    data[at // 8] ^= 1 << at % 8
    if RECORD_BYTES <= at // 8 < RECORD_BYTES + 5:
        assert next(read_members(bytes(data))).payload != b"12345"
        return
    with pytest.raises(ValueError, match="offset 0"):
        list(read_members(bytes(data)))
