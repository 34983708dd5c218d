"""The ``casp`` command: plan, run, check, fold; eval, bench; sweep; report."""

from casp_plugin.cli import compress, measure, report, sweep  # noqa: F401  their commands
from casp_plugin.cli.app import app, main

__all__ = ["app", "main"]
