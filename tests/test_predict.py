"""The model of kernel times explains what was measured as well as it says, and its JSON is what the
script gives."""

from __future__ import annotations

import json
from typing import Any

import baseline
import gpu_launches as kernels
import predict
import pytest
from gpu_model import Device, Launch, alone, in_graph, off, units


@pytest.fixture(scope="module")
def found() -> predict.Row:
    return predict.document()


def same(value: Any, written: Any) -> bool:
    """Rounding may differ in the last digit that is written."""
    if isinstance(written, dict):
        return value.keys() == written.keys() and all(same(value[k], written[k]) for k in written)
    if isinstance(written, list):
        return len(value) == len(written) and all(map(same, value, written))
    return bool(value == (pytest.approx(written, 2e-3) if isinstance(written, float) else written))


def test_the_json_is_what_the_script_gives(found: predict.Row) -> None:
    written = json.loads((predict.RESULTS / "predicted.json").read_text())
    assert same(found, written), "run benchmarks/predict.py --json"


def test_predictions_that_are_said_to_be_the_models(found: predict.Row) -> None:
    modelled = {baseline.key(row): row["modelled"] for row in found["predictions"]}
    for line in json.loads(baseline.PREDICTIONS.read_text())["lines"]:
        if line["because"] == "benchmarks/predict.py":
            assert line["microseconds"] == pytest.approx(modelled[baseline.key(line)], rel=0.01)


def test_the_launches_and_chains_that_were_measured(found: predict.Row) -> None:
    ratios = {name: [row["ratio"] for row in found[name]] for name in ("launches", "chains")}
    assert len(ratios["launches"]) == 20
    assert found["errors"]["launches"]["median"] < 0.15
    assert found["errors"]["launches_left_out"]["median"] < 0.2
    assert found["errors"]["chains"]["median"] < 0.2
    both = [off(ratio) for of_name in ratios.values() for ratio in of_name]
    within = [error for error in both if error <= found["range"] - 1 + 1e-3]
    assert len(within) >= predict.WITHIN * len(both)


def test_cuts_are_those_that_ran() -> None:
    """Grids as ncu has them, for 11008 x 4096."""
    (lut, lut_finish), d4 = (
        kernels.look_up(11008, 4096, stages=2),
        kernels.multiply(11008, 4096, 4, 1),
    )
    assert (lut.blocks, lut_finish.blocks) == (114, 344)
    assert [launch.blocks for launch in d4] == [4, 132, 86]
    assert [launch.blocks for launch in kernels.multiply(11008, 4096, 6, 16)] == [6, 132, 1376]


def test_what_bounds_a_launch() -> None:
    device = Device()
    read = Launch("read", 132, 1, 1, read=30.0)
    assert units(read, device)["dram"] == pytest.approx(10.0)
    assert alone(read, device) == pytest.approx(device.start + device.latency + 10.0)
    few = Launch("few", 66, 1, 0, instructions=528.0)  # on half of the multiprocessors
    assert units(few, device)["issue"] == pytest.approx(2e6 / device.clock)
    starved = Launch("starved", 132, 1, 1, read=30.0, flight=4096.0)
    assert alone(starved, device) > 2 * alone(read, device)
    later = Launch("later", 132, 1, 3, early=2)
    assert in_graph([read, later], device) == pytest.approx(
        in_graph([read], device) + device.latency
    )
