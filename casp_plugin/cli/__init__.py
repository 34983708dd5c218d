"""The ``casp`` command: plan, run, check, fold; eval."""

from casp_plugin.cli import compress, evaluate  # noqa: F401  their commands
from casp_plugin.cli.app import app, main

__all__ = ["app", "main"]
