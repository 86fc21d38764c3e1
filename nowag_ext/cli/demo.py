"""``nowag-ext demo``."""

from __future__ import annotations

from pathlib import Path

from nowag_ext.cli import options
from nowag_ext.cli.base import app, err, out, reported
from nowag_ext.demo import Effort, run_demo


@app.command()
@reported
def demo(
    model: options.DemoModel = None,
    output: options.DemoOutput = Path("nowag-demo"),
    fast: options.Fast = False,
) -> None:
    """Compresses a small real model, to 2 bits and by pruning, and shows what each costs."""
    run_demo(model, output, out=out, err=err, effort=Effort.fast() if fast else Effort())
