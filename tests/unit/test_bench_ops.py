"""The op benchmark's table: every case runs, forward and backward, and all who compute it get the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import ops as benchmark
from benchmarks import ops_cases, ops_report, ops_rivals, ops_warm
from benchmarks.ops_cases import Case, Other, Work
from benchmarks.ops_cases_loss import head_operands
from benchmarks.ops_timing import Device, Timed
from megatune import ops

ROOT = Path(__file__).parents[2]

# Registered, and not in the table.
WITHOUT_CASE = {
    "attention_block": "parts of attention under context parallelism; its kernels are those of attention's body",
}
# Results that are not the same within rounding: 8 bits against bf16, products in bf16 against fp32.
ROUNDED = {"fp8_linear": 0.05, "fp8_linear_blocks": 0.05, "muon": 0.02}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, threads = tmp_path_factory.mktemp("bench") / "ops.json", torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark.main(["--device", "cpu", "--tiny", "--out", str(path)])
    torch.set_num_threads(threads)
    ops.configure({}, "cpu")
    return path


@pytest.fixture(scope="module")
def content(path: Path) -> dict:
    return json.loads(path.read_text())


def all_cases() -> Iterator[tuple[str, str, Case]]:
    for model, sizes in ops_cases.TINY.items():
        for op, make in ops_cases.makers(model, sizes, torch.float32, "cpu"):
            yield model, op, make()


def test_every_registered_op_has_a_case_under_its_name() -> None:
    found = list(all_cases())
    assert all(case.op == op for _, op, case in found)
    covered = {case.registry or case.op for _, _, case in found} & set(ops.OPS)
    assert set(ops.OPS) - covered == set(WITHOUT_CASE)


def test_all_get_the_same_results(content: dict) -> None:
    wanted = {(model, op) for models, op, _ in ops_cases.CASES for model in models}
    left = {(one["model"], one["op"]) for one in content["left_out"]}
    assert {(row["model"], row["op"]) for row in content["rows"]} | left == wanted
    assert all(one["why"].startswith("the same as ") for one in content["left_out"])
    for row in content["rows"]:
        assert "failed" not in row, row
        assert row["difference"] < ROUNDED.get(row["op"], 1e-5), row
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


def test_a_part_of_a_run_takes_the_place_of_its_rows_alone(path: Path, content: dict, tmp_path: Path) -> None:
    def again(change: dict, *arguments: str) -> dict:
        out = tmp_path / "ops.json"
        out.write_text(json.dumps(content | change))
        benchmark.main(["--device", "cpu", "--tiny", "--out", str(out), *arguments])
        return json.loads(out.read_text())

    def key(row: dict) -> tuple:
        return row["model"], row["op"], row.get("body"), row.get("by")

    part = ("--models", "llama-8b", "--only", "swiglu")
    merged = again({}, *part)
    assert list(map(key, merged["rows"])) == list(map(key, content["rows"]))
    changed = {key(row) for row in merged["rows"] if row not in content["rows"]}
    assert changed and all(one[:2] == ("llama-8b", "swiglu") for one in changed)
    assert [run["models"] for run in merged["runs"]][1:] == [["llama-8b"]]
    other = again({"torch": "1.0"}, *part)
    assert {row["op"] for row in other["rows"]} == {"swiglu"} and len(other["runs"]) == 1
    late = again({}, *part, "--seconds", "-1")
    assert late["rows"] == content["rows"] and late["left_out"] == content["left_out"]


def test_verdicts_name_what_is_below_its_target_or_slower_than_another() -> None:
    def rows(small: dict) -> list[dict]:
        what = {"model": "m", "op": "o", "shape": "1", "difference": 0.0}
        ours = {"body": "cuda", "chosen": True, "targets": [0.88, None]}
        ours |= {"forward_ms": 1.0, "forward_share": 0.8, "backward_ms": 1.04, "backward_share": 0.1}
        rival = {"by": "theirs", "forward_ms": 0.98, "backward_ms": 1.0}
        wrong = {"by": "wrong", "forward_ms": 0.1, "backward_ms": 0.1, "difference": 1.0}
        return [what | ours | small, what | rival, what | wrong, what | {"by": "broken", "failed": "Error"}]

    forward, backward = ops_report.verdicts(rows({}))
    assert (forward["direction"], forward["target"]) == ("forward", 0.88) and "rival" not in forward
    assert (backward["rival"], backward["rival_ms"]) == ("theirs", 1.0) and "target" not in backward
    (only,) = ops_report.verdicts(rows({"forward_small_share": 0.9}))
    assert only["direction"] == "backward"
    assert "1.04 times theirs's 1 ms" in ops_report.said([only])[1]
    # Of products, shares are compared: a rival that was measured at a higher clock is not faster.
    products = rows(
        {"forward_tflops": 1.0, "backward_tflops": 1.0, "forward_share": 0.9, "backward_share": 0.9}
    )
    products[1] |= {
        "forward_share": 0.89,
        "forward_tflops": 1.0,
        "backward_share": 0.95,
        "backward_tflops": 1.0,
    }
    (slower,) = ops_report.verdicts(products[:2])
    assert (slower["direction"], slower["times"]) == ("backward", pytest.approx(0.95 / 0.9, abs=1e-3))
    failed = {"model": "m", "op": "o", "shape": "1", "body": "cuda", "chosen": True, "failed": "Error: x"}
    assert ops_report.verdicts([failed])[0]["failed"] == "Error: x"


def test_the_page_shows_every_case_and_is_that_of_the_committed_results(content: dict) -> None:
    text = ops_report.page(content, "x.json")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cases = {(row["model"], row["op"]) for row in content["rows"]}
    assert len(lines) == len(cases) + 3 and "quack-kernels 0.6.5" in text
    for page, file in (("ops.md", "ops_h200.json"), ("ops_h100.md", "ops_h100.json")):
        committed = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        assert (ROOT / "docs" / page).read_text() == ops_report.page(committed, f"benchmarks/results/{file}")


def test_a_rival_that_is_wrong_or_fails_is_seen() -> None:
    _, _, case = next(all_cases())
    truth = benchmark.truth_of(case)
    wrong = Other(lambda x, weight: ops_cases.plain_norm(x, weight) * 1.01)
    assert benchmark.difference(case, wrong, truth) == pytest.approx(0.01, rel=1e-3)
    other_gradient = Other(lambda x, weight: ops_cases.plain_norm(x, weight) + 0.1 * (x - x.detach()))
    assert benchmark.difference(case, other_gradient, truth) > 1e-3
    assert benchmark.difference(case, Other(lambda x, weight: x[1:] * weight), truth) == float("inf")
    broken = benchmark.Candidate("broken", Other(lambda x, weight: x @ weight[1:]))
    row = benchmark.row_of(broken, case, Device("cpu", copy=1e9), torch.float32, truth)
    assert row["failed"].startswith("RuntimeError: ") and "forward_ms" not in row


def test_limits_are_what_the_device_does_itself() -> None:
    device = Device("cpu", copy=2e9, products={"NT 64 x 64 x 64": 2.0}, small_copies={40000: 0.03})
    assert device.limit_ms(Work(size=4e6), torch.float32) == pytest.approx(2.0)
    assert device.limit_ms(Work(flops=4 * 64**3), torch.float32) == pytest.approx(4.0)
    timed = Timed(4.0, "clock")
    assert benchmark.rates("forward", timed, 2.0, Work(size=4e6), device) == {
        "forward_ms": 4.0,
        "forward_share": pytest.approx(0.5),
        "forward_gbytes_per_s": pytest.approx(1.0),
    }
    short = benchmark.rates("forward", Timed(0.04, "graph"), 0.02, Work(size=40000), device)
    assert short["forward_share"] == pytest.approx(0.5) and short["forward_small_share"] == pytest.approx(
        0.75
    )
    sets = Device("cuda", cache=60 * 2**20)
    assert [sets.sets(size) for size in (2**20, 60 * 2**20, 2**30)] == [64, 3, 2]


def test_a_job_is_taken_once_by_those_who_compile(tmp_path: Path) -> None:
    taken = []

    def fail() -> None:
        taken.append("fails")
        raise RuntimeError("cannot be compiled")

    for _ in range(2):
        ops_warm.share([("m a", fail), ("m b", lambda: taken.append("second"))], tmp_path)
    assert taken == ["fails", "second"]
    assert [json.loads((tmp_path / name).read_text())[0] for name in ("m a", "m b")] == ["m a", "m b"]


def test_without_time_nothing_is_begun_and_it_is_said(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "ops.json")]
    content = benchmark.main(["--device", "cpu", "--tiny", "--only", "rope", "--seconds", "-1", *out])
    assert content["rows"] == []
    left = [(one["model"], one["op"], one["why"]) for one in content["left_out"]]
    assert left == [(model, "rope", "no time left") for model in ops_cases.MODELS]


def test_products_are_taken_beside_the_call_with_its_own_numbers() -> None:
    device, x, head = Device("cpu"), torch.randn(4, 6), torch.randn(5, 6)
    products = (("NT", 4, 5, 6), ("TN", 5, 6, 4))
    labels = torch.tensor([0, 4, -100, 2])
    own = Work(flops=1, products=products, operands=lambda *given: head_operands(*given, labels)[::2])
    called: list[int] = []
    for number, work in enumerate((own, Work(flops=1, products=products))):
        timed, bare = device.beside_products(lambda: called.append(1), work, torch.float32, (x, head))
        assert len(called) == number + 1 and timed.how == "clock" and timed.ms > 0
        assert set(device.products) == {"NT 4 x 5 x 6", "TN 5 x 6 x 4"}
        assert bare == pytest.approx(sum(device.products.values()))
        first, second = device.bare_products(work, torch.float32, (x, head))
        assert first().shape == (4, 5) and second().shape == (5, 6)
    first, second = device.bare_products(own, torch.float32, (x, head))
    assert torch.equal(first(), x @ head.t())
    leaf = head.clone().requires_grad_()
    torch.nn.functional.cross_entropy(x @ leaf.t(), labels, reduction="sum").backward()
    torch.testing.assert_close(second(), leaf.grad)
