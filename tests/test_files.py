import errno
import os

import pytest
import torch

from dysurgery import DysurgeryError
from dysurgery.files import write_atomically, write_text


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("place", ["write", "fsync"])
def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch, place):
    path = write_text(tmp_path / "file.pt", "good")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DysurgeryError, match=r"disk is full.*kept"):
        write_atomically(path, full if place == "write" else lambda file: torch.save({"x": torch.ones(9)}, file))
    assert path.read_text() == "good"
    assert os.listdir(tmp_path) == ["file.pt"]


def test_a_really_full_device_is_named():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="space"):
        full.write(b"x")


def test_no_permission_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DysurgeryError, match="cannot write"):
        write_text(blocked / "inner.txt", "x")
