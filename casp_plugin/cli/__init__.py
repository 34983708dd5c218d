"""The ``casp`` command: plan, run, check, fold; eval, bench; sweep."""

from casp_plugin.cli import compress, measure, sweep  # noqa: F401  their commands
from casp_plugin.cli.app import app, main

__all__ = ["app", "main"]
