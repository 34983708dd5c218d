"""What is written is there whole or not at all, whatever happens on the way."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from support.samples import save_texts
from support.tiny_models import save_tiny_model

from casp_plugin.system.files import whole_file, whole_folder, write_whole


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


RECIPE = """
casp_stage:
  casp_modifiers:
    LowRankQKModifier: {}
    BitAllocationModifier: {average_bits: 3.4, group_size: 64}
    GPTQModifier: {}
"""


@pytest.mark.parametrize(
    ("limit", "cached", "what"),
    [
        pytest.param(2_000, True, "cache", marks=pytest.mark.models),
        (100_000, True, "0000.safetensors"),
        pytest.param(300_000, False, "out", marks=pytest.mark.models),
    ],
    ids=["facts", "part", "checkpoint"],
)
def test_a_full_disk_in_a_run(tmp_path, limit, cached, what):
    """The system refuses to write files larger than a limit: one line that says where, nothing
    half-written, and the same command goes on once there is room."""
    source = save_tiny_model(tmp_path / "in", hidden_size=256, intermediate_size=512)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_texts(tmp_path / "data.jsonl")
    command = [sys.executable, "-m", "casp_plugin", "run", source, "--recipe", "recipe.yaml"]
    command += ["--dataset", "data.jsonl", "--output", "out", "--max-length", "32"]
    command += ["--cache", "cache"] if cached else ["--no-cache"]

    def run(bytes_of_a_file=resource.RLIM_INFINITY):
        return subprocess.run(
            command,
            cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file,) * 2),
            capture_output=True,
            text=True,
        )

    before = {path.name for path in tmp_path.iterdir()}
    failed = run(limit)
    assert failed.returncode == 1
    last = failed.stderr[failed.stderr.rindex("error:") :].replace("\n", "")
    assert "too large" in last
    assert what in last
    assert "Traceback" not in failed.stderr
    assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}
    assert not list(tmp_path.rglob(".*"))
    if what == "0000.safetensors":
        again = run()
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "out" / "config.json").exists()


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
