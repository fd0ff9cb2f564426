"""A file's identity: every byte of a small file, a sample of a large one; nothing is waited for."""

import os

import pytest

from checkpoints import identity as module
from checkpoints.identity import identity
from config import UserError


@pytest.fixture
def small_limits(monkeypatch):
    """Make 64 bytes the most that is hashed whole, and a block of 4 at every 16 the sample."""
    monkeypatch.setattr(module, "WHOLE", 64)
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "SPACING", 16)


def test_content_decides_not_name_nor_date(tmp_path):
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"sane")):
        (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / "b", (0, 0))
    os.utime(tmp_path / "c", (0, 0))

    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    assert identity(tmp_path / "a") != identity(tmp_path / "c")
    assert identity(tmp_path / "a")["size"] == 4


def test_every_byte_of_a_small_file_counts(tmp_path, small_limits):
    file = tmp_path / "file"
    content = bytes(64)
    file.write_bytes(content)
    found = {identity(file)["blake2b"]}
    for place in range(64):
        file.write_bytes(content[:place] + b"\1" + content[place + 1 :])
        found.add(identity(file)["blake2b"])
    assert len(found) == 65


@pytest.mark.parametrize("size", [65, 100, 1000, 1001])
def test_a_change_as_long_as_the_spacing_is_seen_wherever_it_is(tmp_path, small_limits, size):
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    before = identity(file)
    for place in range(0, size - 16 + 1):
        file.write_bytes(bytes(place) + b"\1" * 16 + bytes(size - place - 16))
        assert identity(file) != before, place


def test_of_a_huge_file_a_bounded_part_is_read(tmp_path):
    # The file is sparse: it takes no room on the disk.
    file = tmp_path / "file"
    with open(file, "wb") as f:
        f.truncate(2**42)
    assert identity(file)["size"] == 2**42
    blocks = module._blocks(2**42)
    assert len(blocks) == module.MOST_BLOCKS
    assert blocks[0][0] == 0 and blocks[-1] == (2**42 - module.BLOCK, module.BLOCK)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "link", "folder"):
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            identity(tmp_path / name)
    for name in ("absent", "zero\0byte"):
        with pytest.raises(UserError, match="cannot be read"):
            identity(tmp_path / name)
