"""Files and folders that are written whole or not at all."""

import errno
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from casp_plugin.system.distributed import barrier, is_source_process, shared

__all__ = ["whole_file", "whole_folder", "write_whole"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then move it into place; make missing folders."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, moved to ``path`` when the block ends.

    On any failure it is removed, and ``path`` stays as it was. Missing folders are made.

    :raises OSError: if the disk is full; the message names ``path``
    """
    handle, name = tempfile.mkstemp(prefix=_temporary_prefix(path), dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        with _naming_full_disk(path):
            yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, whose files move there when the block ends.

    On any failure it is removed, and ``target`` stays as it was. Files that ``target`` already
    holds under other names are kept. All ranks of `torchrun` get the same folder.

    :raises OSError: if the disk is full; the message names ``target``
    """
    if not is_source_process():
        yield shared(None)
        barrier()
        return
    target = Path(target)
    partial = Path(tempfile.mkdtemp(prefix=_temporary_prefix(target), dir=target.parent))
    try:
        with _naming_full_disk(target):
            yield shared(partial)
        barrier()
        if not target.exists():
            partial.chmod(0o777 & ~_umask())
            partial.rename(target)
        else:
            for path in sorted(partial.iterdir()):
                if (target / path.name).is_dir():
                    shutil.rmtree(target / path.name)
                os.replace(path, target / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    """Add the path to errors of a full disk that do not name one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        for number in _FULL:  # safetensors has the number in its message only
            if getattr(error, "errno", None) == number or f"os error {number}" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _temporary_prefix(target: Path) -> str:
    """Return how names of temporary files for a target begin: target, machine, process.

    Make missing folders, and remove what killed processes of this machine have left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    machine = socket.gethostname()
    for left in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(machine)}-*"):
        owner = left.name.removeprefix(f".{target.name}.{machine}-").partition(".")[0]
        if owner.isdecimal() and not _alive(int(owner)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return f".{target.name}.{machine}-{os.getpid()}."


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, of another user
        pass
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
