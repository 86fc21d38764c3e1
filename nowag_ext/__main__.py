"""``python -m nowag_ext`` is the command ``nowag-ext``, wherever its script is not on PATH."""

from nowag_ext.cli import app

app(prog_name="python -m nowag_ext")
