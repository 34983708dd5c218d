"""What is written is there whole or not at all, whatever happens on the way."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from casp_plugin.files import whole_file, whole_folder, write_whole


def _fail(write, target):
    with write(target) as partial:
        half = partial / "model.safetensors" if partial.is_dir() else partial
        half.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing(tmp_path):
    """Neither a part of what was being written, nor harm to what was there."""
    write_whole(tmp_path / "a.json", "before")
    for write, target in ((whole_file, "a.json"), (whole_folder, "out")):
        with pytest.raises(OSError, match="No space left"):
            _fail(write, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


def _stuck(folder, name):
    with whole_folder(folder / name) as partial, whole_file(folder / f"{name}.json") as file:
        (partial / "model.safetensors").write_bytes(b"half")
        file.write_text("half")
        (folder / "ready").touch()
        time.sleep(60)


def test_what_a_killed_process_left_goes_away(tmp_path):
    """But not what another one is still writing."""
    context = multiprocessing.get_context("fork")
    processes = []
    for _ in range(2):
        process = context.Process(target=_stuck, args=(tmp_path, "out"))
        process.start()
        processes.append(process)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        (tmp_path / "ready").unlink()
    killed, alive = processes
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert len(list(tmp_path.iterdir())) == 4
    try:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "a").touch()
        write_whole(tmp_path / "out.json", "{}")
        left = [path.name for path in tmp_path.iterdir()]
        assert sorted(name for name in left if name[0] != ".") == ["out", "out.json"]
        assert len(left) == 4
        assert all(f"-{alive.pid}." in name for name in left if name[0] == ".")
    finally:
        alive.kill()
        alive.join()
