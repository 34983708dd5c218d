"""Peak memory of this process: of the accelerator where there is one, else of the host."""

from pathlib import Path

import torch

__all__ = ["peak_memory", "reset_peak_memory"]


def reset_peak_memory() -> None:
    """Reset the peak memory to the memory in use.

    :raises OSError: without an accelerator, where the system is not Linux
    """
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def peak_memory() -> int:
    """Return peak memory in bytes: allocated by torch on the accelerator, else resident on the host
    (VmHWM)."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kilobytes) * 1024
