"""The command ``nowag-ext``: every subcommand is a few calls of the package's public functions."""

from nowag_ext.cli.base import app

from nowag_ext.cli import demo, calibrate, compress, distill, use  # isort: skip  # as in --help

__all__ = ["app", "calibrate", "compress", "demo", "distill", "use"]
