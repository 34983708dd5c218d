"""The ``casp`` command: plan, run, check, fold; eval, bench; sweep, sensitivity; report."""

from casp_plugin.cli import (  # noqa: F401  their commands
    compress,
    measure,
    report,
    sensitivity,
    sweep,
)
from casp_plugin.cli.app import app, main

__all__ = ["app", "main"]
