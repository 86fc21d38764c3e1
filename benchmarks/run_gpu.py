"""Runs everything that a machine with a GPU can tell, a part at a time, and keeps what is done.

    bash benchmarks/run_gpu.sh OUTDIR
    python benchmarks/run_gpu.py OUTDIR --keep    # its figures become results/<device>/

The machine may go away at any second. So OUTDIR always holds a whole result.json and a whole
logs.tar.gz: both are replaced after every part, and while a part runs whenever it has written
figures. Beside them stands modules.tar.gz, what was built. A run whose OUTDIR holds the result.json
of an earlier one (or RESUME names it) goes on with what that left out, if device and sources are
the same.

Parts, in the order in which they matter, each with a limit of its own: modules smoke tests gemv
peers block many timeline compress counters memcheck racecheck model units.

Variables: PYTHON, the interpreter of all parts; BUDGET, seconds for everything (280); LIMIT,
seconds that no part exceeds; SKIP and ONLY, lists of parts; NOWAG_PREBUILT, modules to use instead
of building (gpu_modules.py); FULL=1, all shapes. Nothing is fetched; a package or a tool that is
missing ends the part that wants it. Exit status 0: every part asked for has been done.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import baseline

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 280.0
LEAST = 8.0  # seconds under which no part tells anything
LOOK = 1.0  # seconds between looks at a running part's figures
# Characters of output, of which only an end may be seen: every part's own line, and some of its
# rows, have to be in it.
MOST_ROWS, ROWS_OF_A_PART = 10_400, 600
FINISHED = ("ok", "failed")  # ended by itself: not repeated by a run that goes on

Document = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One command with its limit in seconds.

    ``figures``: it takes --json FILE, and writes what it has as it goes. ``least``: it is not begun
    with less time than this left, because it tells little before its end.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    figures: bool = False
    least: float = LEAST
    environment: dict[str, str] = field(default_factory=dict)


# Every kernel at a small shape; graphs cannot be captured without torch's cache.
MEMCHECK = (
    "(normalize or pack or nm or sparse or (kmeans and 70-13) "
    "or (kmeans_iterations and 2000-300) or (kmeans_seed and 4-256) or (prune_select and shape0) "
    "or (kmeans_feedback and not 5000-) "
    "or (gemv and 1-7) or (many_tokens and 6-12 and 70-) or (vq_dequantize and not large) "
    "or vq_gather) and not graph"
)
# Those whose blocks or warps work together.
RACECHECK = (
    "(kmeans_seed and 4-256) or (kmeans_iterations and 2000-300) or (kmeans_feedback and 300-5) "
    "or (vq_gemv and 576-1537 and dtype0) or (many_tokens and 6-12 and 70-) "
    "or (test_sparse and dtype2)"
)
WORKERS = 12


def parts(python: str, out: Path, full: bool) -> list[Part]:
    """All parts, in order."""

    def bench(name: str, limit: float, least: float = LEAST) -> Part:
        script = f"benchmarks/bench_gpu_{name}.py"
        command = (python, script, *([] if full else ["--quick"]))
        return Part(name, limit, command, figures=True, least=least)

    def sanitizer(tool: str, limit: float, tests: str) -> Part:
        pytest = (python, "-m", "pytest", "-q", "-x", "tests/test_cuda.py", "-k", tests)
        # Without torch's cache, which hides where an allocation ends.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest)
        return Part(tool, limit, command, least=30, environment=environment)

    # More threads than cores would wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS))}
    tests = (python, "-m", "pytest", *test_options(python), "tests/test_cuda.py")
    return [
        Part("modules", 160, (python, "benchmarks/gpu_modules.py", str(out / "modules.tar.gz"))),
        bench("smoke", 30),
        Part("tests", 100, tests, least=40, environment=threads),
        bench("gemv", 60),
        bench("peers", 90),
        bench("block", 25),
        bench("many", 40),
        bench("timeline", 30),
        bench("compress", 40),
        bench("counters", 75, least=30),
        sanitizer("memcheck", 75, MEMCHECK),
        sanitizer("racecheck", 75, RACECHECK),
        bench("model", 75),
        bench("units", 60, least=30),
    ]


def test_options(python: str) -> list[str]:
    """pytest's options with the plugins that are there."""

    def has(module: str) -> bool:
        find = f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"
        return subprocess.run([python, "-c", find], capture_output=True).returncode == 0

    options = ["-q", "--durations=8"]
    if has("xdist"):
        options += ["-n", str(WORKERS), "--dist", "worksteal"]
    if not has("hypothesis"):  # conftest.py wants it, test_cuda.py does not
        options.append("--noconftest")
    return options


def sources() -> str:
    """A digest of what is measured: figures of different sources are not mixed."""
    total = hashlib.sha256()
    for folder, pattern in (("csrc", "*"), ("nowag_ext", "*.py")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file():
                total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def machine() -> Document:
    """Device and driver, and the commit, as far as this can be told without torch."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit",
             "--format=csv,noheader"]  # fmt: skip
    line = output(query).partition("\n")[0]
    commit = output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or os.environ.get("COMMIT", "")
    return {"device": line.partition(",")[0].strip(), "nvidia_smi": line, "commit": commit}


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def replace(path: Path, content: bytes) -> None:
    """Puts a file in its place in one step: whoever looks finds the old one or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


class Run:
    """One run: its folder, its result so far, and how much it has printed."""

    def __init__(self, out: Path, work: Path, budget: float) -> None:
        self.out, self.work, self.budget = out, work, budget
        self.begin = time.monotonic()
        self.shown = 0
        self.result: Document = {"machine": machine(), "sources": sources(), "parts": {}}
        self.baseline = baseline.of_device(self.result["machine"]["device"])

    def resume(self) -> None:
        """Takes over an earlier run's result and logs, if they are of the same device and code."""
        path = Path(os.environ.get("RESUME") or self.out / "result.json")
        if not path.is_file():
            return
        earlier = json.loads(path.read_text())
        same = earlier.get("sources") == self.result["sources"]
        device = earlier.get("machine", {}).get("device")
        if not same or device != self.result["machine"]["device"]:
            self.say(f"{path} is of other sources or another device: beginning anew")
            return
        self.result["parts"] = earlier["parts"]
        logs = path.with_name("logs.tar.gz")
        if logs.is_file():
            with tarfile.open(logs) as archive:
                # Releases of Python before its security fix of 2023 have no filters.
                archive.extraction_filter = getattr(tarfile, "data_filter", lambda one, _: one)
                archive.extractall(self.work)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.shown += len(text) + 1

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def record(self, name: str, **facts: Any) -> None:
        """Notes facts of a part, with its figures if there are any, and saves."""
        part = self.result["parts"].setdefault(name, {})
        part.update(facts)
        figures = self.work / f"{name}.json"
        if figures.is_file():
            with contextlib.suppress(ValueError):  # not whole: a part was killed while it wrote
                document = json.loads(figures.read_text())
                before = part.get("document", {}).get("lines", [])
                if len(document["lines"]) >= len(before):  # an earlier run may have come further
                    part["document"] = document
        self.save()

    def save(self) -> None:
        replace(self.out / "result.json", (json.dumps(self.result, indent=1) + "\n").encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path in sorted(self.work.iterdir()):
                archive.add(path, path.name)
        replace(self.out / "logs.tar.gz", packed.getvalue())

    def do(self, part: Part) -> str:
        """Runs one part up to its limit; returns how it ended."""
        if self.left() < part.least:
            self.record(part.name, status="no time")
            return "no time"
        limit = min(part.limit, self.left(), float(os.environ.get("LIMIT", "inf")))
        figures = self.work / f"{part.name}.json"
        figures.unlink(missing_ok=True)
        command = [*part.command, *(["--json", str(figures)] if part.figures else [])]
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"),
                                *filter(None, [os.environ.get("PYTHONPATH")])])  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1",
                       **part.environment}  # fmt: skip
        begin = time.monotonic()
        with (self.work / f"{part.name}.log").open("w") as log:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n")
                status = "failed"
            else:
                try:
                    status = self.watch(process, part.name, begin + limit, figures)
                except BaseException:  # a signal: what there is, is saved
                    self.record(part.name, status="interrupted")
                    raise
        self.record(part.name, status=status, seconds=round(time.monotonic() - begin, 1))
        return status

    def watch(
        self, process: subprocess.Popen[bytes], name: str, deadline: float, figures: Path
    ) -> str:
        """Waits for a part to end or for its deadline; saves its figures as they come."""
        saved = 0.0
        try:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    return "failed" if process.wait(min(LOOK, left)) else "ok"
                except subprocess.TimeoutExpired:
                    pass
                written = figures.stat().st_mtime if figures.is_file() else 0.0
                if written > saved:
                    self.record(name, status="running")
                    saved = written
            return "ended at its limit"
        finally:
            end(process)

    def show(self, name: str, parts_to_come: int = 0) -> None:
        """One line about a part; its figures beside what is known; what is missing, and why."""
        part = self.result["parts"][name]
        status, log = part["status"], self.work / f"{name}.log"
        text = log.read_text(errors="replace").splitlines() if log.is_file() else []
        last = next((line.strip() for line in reversed(text) if line.strip()), "")
        self.say(f"== {name}: {status}, {part.get('seconds', 0):.0f} s | {last[:60]}")
        rows = self.baseline.table(part.get("document", {}).get("lines", []))
        rows += [line[:120] for line in text if " left out: " in line][:4]
        if status != "ok":
            rows += [line[:160] for line in text[-6:-1]]
        most = MOST_ROWS - ROWS_OF_A_PART * parts_to_come
        for at, row in enumerate(rows):
            if self.shown + len(row) > most:
                self.say(f"  ... {len(rows) - at} more rows in result.json")
                break
            self.say(f"  {row}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # its device hangs: others may tell more
        process.wait(timeout=10)


def keep(out: Path, results: Path = baseline.RESULTS) -> None:
    """Writes the figures of every part that came to its end to the folder of their device."""
    result = json.loads((out / "result.json").read_text())
    folder = results / baseline.device_folder(result["machine"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in result["parts"].items():
        if "document" in part and part["status"] == "ok":
            (folder / f"{name}.json").write_text(json.dumps(part["document"], indent=1) + "\n")
            print(folder / f"{name}.json")
        elif "document" in part:
            print(f"{name}: {part['status']}, not kept")


def selection() -> Callable[[str], bool]:
    """Whether a part is asked for, by ONLY and SKIP; modules are, whatever the others."""
    only, skip = (os.environ.get(name, "").split() for name in ("ONLY", "SKIP"))
    return lambda name: name not in skip and (not only or name in (*only, "modules"))


def terminate(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def run(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    python = shutil.which(os.environ.get("PYTHON", "python3")) or sys.executable
    wanted = selection()
    with tempfile.TemporaryDirectory() as work:
        this = Run(out.resolve(), Path(work), float(os.environ.get("BUDGET", BUDGET)))
        this.resume()
        this.save()
        this.say(f"{this.result['machine']['nvidia_smi']}; {baseline.LEGEND}")
        missing = []
        every = parts(python, this.out, bool(os.environ.get("FULL")))
        for at, part in enumerate(every):
            status = this.result["parts"].get(part.name, {}).get("status")
            if not wanted(part.name):
                this.say(f"== {part.name}: left out")
                continue
            # Modules are of the machine, not of the run: there may be none here yet.
            if status in FINISHED and part.name != "modules":
                this.say(f"== {part.name}: {status} before")
            else:
                status = this.do(part)
                this.show(part.name, sum(later.figures for later in every[at + 1 :]))
            if status != "ok":
                missing.append(f"{part.name} ({status})")
                if part.name == "modules":
                    break  # nothing else could run
        print(f"{time.monotonic() - this.begin:.0f} s; not done: {', '.join(missing) or 'nothing'}")
    return int(bool(missing))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument("--keep", action="store_true", help="write its figures to results/<device>")
    options = parser.parse_args()
    if options.keep:
        keep(options.out)
        return 0
    signal.signal(signal.SIGTERM, terminate)
    return run(options.out)


if __name__ == "__main__":
    raise SystemExit(main())
