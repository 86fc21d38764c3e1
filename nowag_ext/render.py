"""What a person sees: progress with an estimate of the time left, and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from nowag_ext.cost import Forecast
from nowag_ext.environment import Environment
from nowag_ext.report import LayerReport, ModelReport, Progress, settings_text


class _Times(ProgressColumn):
    """ "0:01:30 elapsed, 0:00:30 left": at the mean speed since the stage began."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        text = f"{timedelta(seconds=int(elapsed))} elapsed"
        gone = task.completed - task.fields.get("begun_at", 0.0)
        if task.total and gone > 0:
            left = elapsed * max(0.0, task.total - task.completed) / gone
            text += f", {timedelta(seconds=int(left))} left"
        return Text(text, style="progress.remaining")


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Yields a callback (stage, done, total) that draws one bar, with the time left.

    The bar vanishes when the block ends; where the console is no terminal nothing is drawn. Where
    the total changes or less is done than before, another stage has begun.
    """
    bar = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _Times(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=None)

    def show(stage: str, done: float, total: float) -> None:
        now = bar.tasks[0]
        if now.total != (total or None) or done < now.completed:
            # What is done at once, from an earlier run, took no time.
            bar.reset(task, total=total or None, completed=int(done), begun_at=done)
        bar.update(task, description=stage, completed=done)

    with bar:
        yield show


@contextmanager
def loading(console: Console, source: str) -> Iterator[None]:
    """Says that a model is being loaded, and for how long; nothing where there is no terminal."""
    bar = Bars(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), _Times(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    path = Path(source)
    size = f" ({megabytes(path.stat().st_size)} MB)" if path.is_file() else ""
    bar.add_task(f"loading {source}{size}", total=None)
    with bar:
        yield


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True
) -> Table:
    """A table; with ``numbers`` every column but the first is right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if numbers and index else "left")
    for row in rows:
        result.add_row(*row)
    return result


def report_table(report: ModelReport) -> Table:
    """One line for each kind of linear layer compressed in one way, and one for all of them."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kind = layer.name.rpartition(".")[2] + _otherwise(layer, report)
        kinds.setdefault(kind, []).append(layer)
    rows = [_kind_row(kind, layers) for kind, layers in kinds.items()]
    shared = report.codebook_bytes
    if shared:
        rows.append(("shared codebooks", "", "", "", megabytes(shared), ""))
    rows.append(_kind_row("all", report.layers, shared))
    if report.head is not None:
        form = {name: report.head.settings[name] for name in ("d", "bits")}
        rows.append(_kind_row(f"{report.head.name} ({settings_text(form)})", [report.head]))
        rows.append(_kind_row("with it", [*report.layers, report.head], shared))
    columns = ("linears", "number", "relative objective", "bits/weight", "MB", "seconds")
    return table(f"{report.method}: {settings_text(report.settings)}", columns, rows)


def forecast_tables(forecast: Forecast) -> list[Table]:
    """What a run will write, and what it will take."""
    sizes = forecast.sizes
    facts = [
        ("bits per compressed weight, all in", f"{sizes.bits_per_weight:.3f}"),
        *([("MB of the packed head", megabytes(sizes.head))] if sizes.head else []),
        ("MB of the weights' files", megabytes(sizes.checkpoint)),
        ("MB on disk at the end, with what is finished", megabytes(sizes.written)),
        ("MB of memory at most", megabytes(forecast.peak_memory)),
        ("time", str(timedelta(seconds=round(forecast.seconds)))),
    ]
    memory = [(name, megabytes(size)) for name, size in forecast.memory.items()]
    seconds = [(name, f"{value:.1f}") for name, value in forecast.stages.items()]
    return [
        table("Forecast", ("", ""), facts),
        table("Memory where it is most", ("of", "MB"), memory),
        table("Time, as fast as this machine is now", ("stage", "seconds"), seconds),
    ]


def _otherwise(layer: LayerReport, report: ModelReport) -> str:
    """What of a layer's method and settings is not the model's, or ""."""
    if layer.method != report.method:
        return f" ({layer.method}: {settings_text(layer.settings)})"
    other = {k: v for k, v in layer.settings.items() if report.settings.get(k) != v}
    return f" ({settings_text(other)})" if other else ""


def stages_text(report: ModelReport) -> str:
    """Where the time of a run went, and its memory, in one line; "" if it had no stages."""
    if not report.stages:
        return ""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stages.items())
    memory = f"{megabytes(report.peak_memory)} MB of memory at most"
    return f"{report.seconds:.1f} seconds in all: {parts}. {memory}."


def _kind_row(kind: str, layers: Sequence[LayerReport], shared: int = 0) -> tuple[str, ...]:
    weights = sum(layer.weights for layer in layers)
    size = sum(layer.bytes for layer in layers) + shared
    objective = sum(layer.relative_objective for layer in layers) / len(layers)
    seconds = sum(layer.seconds for layer in layers)
    return (
        kind, str(len(layers)), f"{objective:.4f}", f"{8 * size / weights:.3f}", megabytes(size),
        f"{seconds:.1f}",
    )  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without its package."""
    return str(dtype).removeprefix("torch.")


def megabytes(size: float) -> str:
    """Bytes in units of 10^6."""
    return f"{size / 1e6:.1f}"


def environment_tables(environment: Environment) -> list[Table]:
    """Versions and backends."""
    parts = {"Versions": environment.versions, "Backends": environment.backends}
    return [
        table(title, ("name", ""), list(facts.items()), numbers=False)
        for title, facts in parts.items()
    ]
