"""The op benchmark's table: every case runs, forward and backward, and all who compute it get the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import ops as benchmark
from benchmarks import ops_cases, ops_rivals
from benchmarks.ops_cases import Other, Work
from benchmarks.ops_timing import Device
from megatune import ops


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "ops.json"
    benchmark.main(["--device", "cpu", "--tiny", "--out", str(path)])
    ops.configure({}, "cpu")
    return json.loads(path.read_text())


def test_all_get_the_same_results(content: dict) -> None:
    wanted = {(model, maker.__name__) for models, maker in ops_cases.CASES for model in models}
    assert {(row["model"], row["op"]) for row in content["rows"]} == wanted
    assert content["left_out"] == []
    for row in content["rows"]:
        assert "failed" not in row, row
        assert row["difference"] < 1e-5, row
        assert (
            row["timed"] == "clock"
            and max(row.get("forward_share", 0), row.get("forward_backward_share", 0)) > 0
        )


def test_every_op_has_one_chosen_body_and_the_reasons_of_those_who_are_absent(content: dict) -> None:
    for model, op in {(row["model"], row["op"]) for row in content["rows"]}:
        ours = [row for row in content["rows"] if (row["model"], row["op"]) == (model, op) and "body" in row]
        assert [row["chosen"] for row in ours].count(True) == 1, (model, op)
    assert content["rivals_absent"]["liger_kernel"] == "its kernels are for GPUs"
    assert "92 MB" in content["rivals_absent"]["quack"]
    assert set(ops_rivals.RIVALS) <= {row["op"] for row in content["rows"]}


def test_a_rival_that_is_wrong_or_fails_is_seen() -> None:
    case = next(iter(ops_cases.cases("llama-8b", ops_cases.TINY["llama-8b"], torch.float32, "cpu")))
    truth = benchmark.truth_of(case)
    wrong = Other(lambda x, weight: ops_cases.plain_norm(x, weight) * 1.01)
    assert benchmark.difference(case, wrong, truth) == pytest.approx(0.01, rel=1e-3)
    other_gradient = Other(lambda x, weight: ops_cases.plain_norm(x, weight) + 0.1 * (x - x.detach()))
    assert benchmark.difference(case, other_gradient, truth) > 1e-3
    assert benchmark.difference(case, Other(lambda x, weight: x[1:] * weight), truth) == float("inf")
    broken = Other(lambda x, weight: x @ weight[1:])
    row = benchmark._row("broken", None, case, broken, Device("cpu", copy=1e9), torch.float32, truth)
    assert row["failed"].startswith("RuntimeError: ") and "forward_ms" not in row


def test_limits_are_what_the_device_does_itself() -> None:
    device = Device(
        "cpu", copy=2e9, products={"NT 4 x 5 x 6": 0.25, "NN 4 x 6 x 5": 0.5, "NT 256 x 256 x 256": 2.0}
    )
    assert device.limit_ms(Work(size=4e6), torch.float32) == pytest.approx(2.0)
    products = (("NT", 4, 5, 6), ("NN", 4, 6, 5))
    assert device.limit_ms(Work(flops=1, products=products), torch.float32) == pytest.approx(0.75)
    assert device.limit_ms(Work(flops=2 * 256**3), torch.float32) == pytest.approx(2.0)
    assert benchmark.rates("forward", 4.0, Work(size=4e6), device, torch.float32) == {
        "forward_share": pytest.approx(0.5),
        "forward_gbytes_per_s": pytest.approx(1.0),
    }
    sets = Device("cuda", cache=60 * 2**20)
    assert [sets.sets(size) for size in (2**20, 60 * 2**20, 2**30)] == [16, 4, 2]


def test_without_time_nothing_is_begun_and_it_is_said(tmp_path: Path) -> None:
    command = [
        "--device",
        "cpu",
        "--tiny",
        "--only",
        "rope",
        "--seconds",
        "-1",
        "--out",
        str(tmp_path / "ops.json"),
    ]
    content = benchmark.main(command)
    assert content["rows"] == []
    assert content["left_out"] == [f"{model} rope: no time left" for model in ops_cases.MODELS]
