"""``python -m casp_plugin``: the same as ``casp``."""

from casp_plugin.cli import main

main()
