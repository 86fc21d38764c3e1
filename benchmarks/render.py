"""Writes the measured sections of a README, and their plots, from the JSON of benchmarks.

    python benchmarks/render.py                # benchmarks/results -> README.md, both of them
    python benchmarks/render.py --check        # exit status 1 if a README says anything else

A section is what stands between `<!-- measured: NAME -->` and `<!-- end -->`. It is made from
NAME.json and, for its column at AVX2, avx2/NAME.json; sections gpu_NAME from the documents of every
GPU, in folders beside that of the results. Without figures a section stays as it is. Plots go to
plots/ beside the README, and need matplotlib: `pip install '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import gpu_tables
from tables import TABLES, Document, source

HERE = Path(__file__).resolve().parent
SECTION = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLOTTED = ("kmeans", "prune", "vq_gemv", "sparse_gemv", "decode")


def load(path: Path) -> Document | None:
    return json.loads(path.read_text()) if path.is_file() else None


def section(name: str, results: Path) -> str | None:
    """The text of one section; None where the benchmark has not been run."""
    if name in gpu_tables.SECTIONS:
        return gpu_tables.section(name, results.parent, load)
    document = load(results / f"{name}.json")
    if document is None:
        return None
    parts = [source(document), TABLES[name](document, load(results / "avx2" / f"{name}.json"))]
    if name in PLOTTED:
        parts.append(f"![{name}](plots/{name}.svg)")
    return "\n\n".join(parts)


def render(text: str, results: Path) -> str:
    """The README with every section made anew."""

    def replaced(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        known = (*TABLES, *gpu_tables.SECTIONS)
        if name not in known:
            raise SystemExit(f"there is no benchmark {name!r}: one of {', '.join(known)}.")
        found = section(name, results)
        return match.group() if found is None else f"{begin}\n{found}\n\n{end}"

    return SECTION.sub(replaced, text)


def write_plots(text: str, results: Path, directory: Path) -> None:
    """The plots of the sections that the README has."""
    try:
        import plots
    except ModuleNotFoundError as error:
        raise SystemExit(f"plots need {error.name}: pip install '.[bench]'.") from None
    for match in SECTION.finditer(text):
        document = load(results / f"{match.group(2)}.json")
        if match.group(2) in PLOTTED and document is not None:
            plots.write(match.group(2), document, directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, default=HERE / "results" / "cpu")
    parser.add_argument(
        "--readme", type=Path, nargs="+", default=[HERE / "README.md", HERE.parent / "README.md"]
    )
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args()
    differ = False
    for readme in options.readme:
        before = readme.read_text()
        after = render(before, options.results)
        if not options.check:
            readme.write_text(after)
            write_plots(after, options.results, readme.parent / "plots")
        elif after != before:
            differ = True
            print(f"{readme} differs from {options.results}: run benchmarks/render.py.")
    return int(differ)


if __name__ == "__main__":
    raise SystemExit(main())
