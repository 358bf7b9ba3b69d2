"""Trackers: what is logged is what a reader finds, also after a resume."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from megatune import track
from megatune.config.schema import Config
from megatune.errors import ConfigError, TrainingError
from megatune.track.base import RunIds, public, tags
from megatune.track.console import Console
from megatune.track.logs import RankLog
from megatune.track.metrics import MetricsFile, read_metrics
from megatune.track.plot import loss_plot, smooth

METRICS = {
    "loss": 1.25,
    "grad_norm": 0.5,
    "lr": 1e-4,
    "tokens": 4096,
    "tokens_per_second_per_gpu": 1234.5,
    "mfu": None,
    "memory_gib": 1.5,
    "step_seconds": 2.0,
}


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank, self.is_main = rank, rank == 0


def make_config(folder: Path, **options: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "x.jsonl"},
            "checkpoint": {"folder": str(folder)},
            "track": options,
        }
    )


def run_steps(tracker: track.Tracker, resumed: int, last: int) -> None:
    """Steps resumed + 1 to last, an evaluation before the first and after every second."""
    tracker.start({}, resumed)
    if resumed == 0:
        tracker.log(0, {"eval_loss": 9.0})
    for step in range(resumed + 1, last + 1):
        tracker.log(step, {"loss": 1 / step, "mfu": None})
        if step % 2 == 0:
            tracker.log(step, {"eval_loss": 2 / step})


def test_a_resumed_metrics_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    for name, stops in (("whole", [(0, 8)]), ("broken", [(0, 5), (4, 7), (4, 6), (6, 8)])):
        (tmp_path / name).mkdir()
        for resumed, last in stops:
            metrics = MetricsFile(tmp_path / name)
            run_steps(metrics, resumed, last)
            metrics.close()
            if last < 8:  # a crash in the middle of a line
                with open(metrics.path, "a") as file:
                    file.write('{"step": 3, "lo')
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken"))
    assert whole == broken
    lines = [json.loads(line) for line in whole.splitlines()]
    assert lines[0] == {"step": 0, "eval_loss": 9.0}
    assert lines[1] == {"step": 1, "loss": 1.0, "mfu": None}
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    # A new run in the same place begins with nothing.
    metrics = MetricsFile(tmp_path / "whole")
    metrics.start({}, 0)
    metrics.close()
    assert metrics.path.read_text() == ""
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["metrics.jsonl"]


def test_metrics_lines_are_there_at_once_and_strict_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.start({}, 0)
    metrics.log(1, {**METRICS, "loss": math.nan, "grad_norm": math.inf})
    line = metrics.path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        **METRICS,
        "loss": None,
        "grad_norm": None,
    }
    metrics.close()


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nowhere/metrics.jsonl cannot be written \(No such file"):
        MetricsFile(tmp_path / "nowhere").start({}, 0)
    metrics = MetricsFile(tmp_path)
    metrics.start({}, 0)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(
        TrainingError, match="step 7: .*metrics.jsonl cannot be written .No space left on device"
    ):
        metrics.log(7, {"loss": 1.0})


def test_tags() -> None:
    assert tags({"loss": 1, "mfu": None, "eval_loss": 2.5}) == {"train/loss": 1.0, "eval/loss": 2.5}
    assert public({"track": {"wandb": {"api_key": "x"}}, "optim": {}}) == {"optim": {}}


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    from megatune.track.tensorboard import TensorBoard

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    run_steps(board, 0, 5)
    board.close()
    board = TensorBoard(tmp_path)
    run_steps(board, 4, 8)  # step 5 is done again
    board.close()
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert sorted(reader.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    losses = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert [event.step for event in reader.Scalars("eval/loss")] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("key", "options"),
    [("tensorboard", True), ("wandb", {}), ("swanlab", {}), ("mlflow", {})],
)
def test_a_missing_package_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, options: Any
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == key]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(ConfigError, match=f"track.{key}: .* pip install {key}, or remove track.{key}"):
        track.build(make_config(tmp_path, **{key: options}), tmp_path, Rank(0))
    # Other ranks have no trackers, hence no such error; rank 0's ends the run.
    track.build(make_config(tmp_path, **{key: options}), tmp_path, Rank(1)).close()


class Calls:
    """A module that notes how its functions are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, results: dict[str, Any]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        module = types.ModuleType(name)
        for function, result in results.items():
            setattr(module, function, self.function(function, result))
        monkeypatch.setitem(sys.modules, name, module)

    def function(self, name: str, result: Any):
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, kwargs) if kwargs else (name, *args))
            if isinstance(result, Exception):
                raise result
            return result

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]


CONFIG = {"optim": {"lr": 0.1}, "track": {"wandb": {"api_key": "secret"}}}


def test_wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatune.track.wandb import WandB

    run = types.SimpleNamespace(id="abc")
    fake = Calls(monkeypatch, "wandb", {"init": run})
    run.log, run.finish = fake.function("log", None), fake.function("finish", None)
    for resumed in (0, 2):
        tracker = WandB(tmp_path, {"project": "p"})
        tracker.start(CONFIG, resumed)
        tracker.log(3, {"loss": 0.5, "mfu": None})
        tracker.close()
    first, again = fake.named("init")
    options = {"dir": str(tmp_path), "config": {"optim": {"lr": 0.1}}, "project": "p"}
    assert first == ("init", options)
    assert again == ("init", {"id": "abc", "resume": "allow", **options})
    assert fake.named("log") == [("log", {"train/loss": 0.5}, {"step": 3})] * 2
    assert len(fake.named("finish")) == 2


def test_swanlab_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatune.track.swanlab import SwanLab

    run = types.SimpleNamespace(id="s1")
    fake = Calls(monkeypatch, "swanlab", {"init": run, "log": None, "finish": None})
    for resumed in (0, 2):
        tracker = SwanLab(tmp_path, {"project": "p", "mode": "offline"})
        tracker.start(CONFIG, resumed)
        tracker.log(3, {"eval_loss": 0.5})
        tracker.close()
    first, again = fake.named("init")
    options = {"logdir": str(tmp_path / "swanlab"), "config": {"optim": {"lr": 0.1}}, "project": "p"}
    assert first == ("init", {**options, "mode": "offline"})
    assert again == ("init", {"id": "s1", "resume": "allow", **options, "mode": "offline"})
    assert (tmp_path / "swanlab").is_dir()
    assert fake.named("log") == [("log", {"eval/loss": 0.5}, {"step": 3})] * 2
    assert len(fake.named("finish")) == 2


def test_mlflow_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatune.track.mlflow import MLflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
    names = ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "end_run")
    fake = Calls(monkeypatch, "mlflow", {"start_run": run, **dict.fromkeys(names)})
    many = {"data": {f"k{i}": "v" * 600 for i in range(150)}, **CONFIG}
    for resumed in (0, 2):
        tracker = MLflow(tmp_path, {"run_name": "r"})
        tracker.start(many, resumed)
        tracker.log(3, {"loss": 0.5})
        tracker.close()
    assert fake.named("set_tracking_uri")[0] == ("set_tracking_uri", (tmp_path / "mlruns").as_uri())
    assert fake.named("set_experiment")[0] == ("set_experiment", "megatune")
    assert [call[1]["run_id"] for call in fake.named("start_run")] == [None, "m1"]
    parameters = [call[1] for call in fake.named("log_params")]
    assert [len(part) for part in parameters] == [100, 51]  # in parts, and once
    assert parameters[1]["optim.lr"] == "0.1"
    assert len(parameters[0]["data.k0"]) == 500
    assert "secret" not in str(fake.calls)
    assert fake.named("log_metrics") == [("log_metrics", {"train/loss": 0.5}, {"step": 3})] * 2
    assert len(fake.named("end_run")) == 2
    with pytest.raises(ConfigError, match=r"track\.mlflow: url is unknown; use tracking_uri"):
        MLflow(tmp_path, {"url": "x"})
    MLflow(tmp_path, {"tracking_uri": "http://server", "experiment": "e"}).start(CONFIG, 0)
    assert fake.named("set_tracking_uri")[-1] == ("set_tracking_uri", "http://server")
    assert fake.named("set_experiment")[-1] == ("set_experiment", "e")


@pytest.mark.parametrize(
    ("key", "function", "message"),
    [
        ("wandb", "init", r"wandb\.init failed \(no key\); log in with `wandb login`"),
        ("swanlab", "init", r"swanlab\.init failed \(no key\); log in with `swanlab login`"),
        ("mlflow", "set_tracking_uri", r"no run could be started at http://x \(no key\); check tracking_uri"),
    ],
)
def test_a_service_that_cannot_start_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, function: str, message: str
) -> None:
    Calls(monkeypatch, key, {function: RuntimeError("no key")})
    options = {"tracking_uri": "http://x"} if key == "mlflow" else {"project": "p"}
    trackers = track.build(make_config(tmp_path, **{key: options}), tmp_path, Rank(0))
    with pytest.raises(ConfigError, match=f"track.{key}: {message}"):
        trackers.start({}, 0, 10)
    trackers.close()


@pytest.mark.parametrize("key", ["wandb", "swanlab", "mlflow"])
def test_the_real_service_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    pytest.importorskip(key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = {"run_name": "r"} if key == "mlflow" else {"project": "p"}
    for resumed in (0, 2):
        trackers = track.build(make_config(tmp_path, **{key: options}), tmp_path, Rank(0))
        trackers.start(CONFIG, resumed, 10)
        trackers.log(resumed + 1, METRICS)
        trackers.log(resumed + 1, {"eval_loss": 1.0})
        trackers.close()
    assert RunIds(tmp_path).get(key)
    assert "did not take step" not in (tmp_path / "logs" / "rank-00000.log").read_text()
    assert list((tmp_path / {"mlflow": "mlruns"}.get(key, key)).iterdir())


class Broken:
    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self.steps: list[int] = []

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        self.steps.append(step)
        raise ConnectionError("server is gone")

    def close(self) -> None:
        raise ConnectionError("still gone")


def test_a_service_that_fails_in_the_middle_does_not_end_the_run(tmp_path: Path, capsys) -> None:
    broken = Broken()
    trackers = track.Trackers(RankLog(tmp_path, 0), Console(), MetricsFile(tmp_path), {"broken": broken})
    trackers.start({}, 0, 3)
    for step in (1, 2, 3):
        trackers.log(step, METRICS)
    trackers.close()
    assert broken.steps == [1, 2, 3]  # it may come back
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: broken did not take step 1 (server is gone); metrics.jsonl has it",
        "warning: broken could not be closed: still gone",
    ]


SUMMARY = {
    "finished": True,
    "step": 4,
    "total_steps": 4,
    "loss": 1.0,
    "eval_before": 2.0,
    "eval_after": 1.5,
    "exports": {"adapter": "runs/x/adapter", "merged": "runs/x/merged"},
}


def test_all_ranks_of_a_run(tmp_path: Path, capsys) -> None:
    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)
    config = make_config(tmp_path, tensorboard=True)
    main = track.build(config, tmp_path, Rank(0))
    main.note("reading [the] data")
    main.start({}, 0, 4)
    main.header({"model": "tiny [x]", "layout": "1 x cpu"})
    main.log(0, {"eval_loss": 2.0})
    for step in range(1, 5):
        main.log(step, METRICS)
    logging.getLogger("somewhere").warning("look out")
    warnings.warn("a library's warning", UserWarning, stacklevel=1)
    main.plot(tmp_path / "loss.png")
    main.finish(SUMMARY, [], [])
    main.close()
    said = capsys.readouterr()
    assert said.err == "warning: look out\n"
    for text in (
        "reading [the] data",
        "model   tiny [x]",
        "step 0: held-out loss 2.0000",
        "step 4/4  loss 1.2500  1,234 tokens/s/GPU  MFU -  1.50 GiB  ETA 0:00:00",
        "held-out loss: 2.0000 before, 1.5000 after (-25.0%)",
        "merged: runs/x/merged",
        "next: megatune chat runs/x/merged",
    ):
        assert text in said.out, text
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    for text in (
        "reading [the] data",
        "layout: 1 x cpu",
        "look out",
        "a library's warning",
        "step 4: {'loss': 1.25",
    ):
        assert text in log, text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())

    other = track.build(config, tmp_path, Rank(1))
    other.note("only in the log")
    other.start({}, 2, 4)
    other.header({"model": "x"})
    other.log(3, METRICS)
    other.plot(tmp_path / "other.png")
    other.finish(SUMMARY, [], [])
    other.failed(ValueError("a bug"))
    other.close()
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "logs" / "rank-00001.log").read_text()
    assert "only in the log" in log
    assert "ended by ValueError: a bug" in log
    assert not (tmp_path / "other.png").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert (logging.getLogger().level, logging.getLogger().handlers) == (level, handlers)


def test_logs_are_appended_to(tmp_path: Path) -> None:
    for text in ("first start", "second start"):
        log = RankLog(tmp_path, 3)
        logging.getLogger("megatune").info(text)
        log.close()
    assert [line.split(": ")[-1] for line in log.path.read_text().splitlines()] == [
        "first start",
        "second start",
    ]


def test_a_failed_run_keeps_its_traceback_in_the_log_only(tmp_path: Path, capsys) -> None:
    trackers = track.Trackers(RankLog(tmp_path, 0), Console(), MetricsFile(tmp_path))
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        trackers.failed(error)
    trackers.failed(ConfigError("a user's mistake"))
    trackers.close()
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert log.count("Traceback") == 1
    assert "ended by ConfigError: a user's mistake" in log


def terminal() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(RichConsole(file=screen, force_terminal=True, width=140, color_system=None)), screen


def test_a_terminal_gets_a_panel_and_one_line_that_is_redrawn() -> None:
    console, screen = terminal()
    console.header({"model": "SmolLM2 [135M]", "layout": "2 x cpu"})
    console.begin(200, 0)
    for step in (1, 2, 200):
        console.log(step, {**METRICS, "mfu": 0.4567})
    console.note("saved [step-000002]")
    console.log(200, {"eval_loss": 1.5})
    console.stop()
    console.stop()
    text = screen.getvalue()
    assert "╭─ megatune" in text
    assert "SmolLM2 [135M]" in text
    assert "step 2/200" in text
    assert "loss 1.2500  1,234 tokens/s/GPU  MFU 45.7%  1.50 GiB  ETA 0:06:38" in text  # 199 steps of 2 s
    assert "ETA 0:00:00" in text
    assert "saved [step-000002]" in text
    assert "step 200: held-out loss 1.5000" in text
    assert "\x1b[?25l" in text  # the cursor was hidden
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and is back


def test_results_on_a_terminal() -> None:
    console, screen = terminal()
    before = [{"prompt": "say\n[hi]", "reference": "hi", "answer": "[bold]old"}]
    after = [{"prompt": "say\n[hi]", "reference": "hi", "answer": "new"}]
    console.finish(SUMMARY, before, after)
    text = screen.getvalue()
    for part in ("prompt 1: say [hi]", "reference 1: hi", "[bold]old", "new", "adapter: runs/x/adapter"):
        assert part in text, part
    console, screen = terminal()
    console.finish({**SUMMARY, "exports": {}, "eval_before": None}, [], [])
    assert "next" not in screen.getvalue()
    console, screen = terminal()
    console.finish({**SUMMARY, "finished": False, "step": 3}, [], [])
    assert (
        "stopped at step 3 of 4; a checkpoint is saved, the same command goes on from it" in screen.getvalue()
    )
    assert "done" not in screen.getvalue()


def test_eta_counts_what_happens_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("megatune.track.console.time.monotonic", lambda: now)
    console, screen = terminal()
    console.begin(1000, 10)
    console.log(11, {"loss": 1.0})
    now = 130.0  # ten steps in 30 s, though each says that it took 1 s
    console.log(21, {"loss": 1.0, "step_seconds": 1.0})
    console.stop()
    assert "ETA -" in screen.getvalue()
    assert "ETA 0:48:57" in screen.getvalue()


def test_smoothing() -> None:
    assert smooth([], 0.9) == []
    assert smooth([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)  # no bias towards zero at the start
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 + 1.5) / 0.75])


def test_plot_of_little_or_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loss_plot(tmp_path / "missing.jsonl", tmp_path / "empty.png")
    metrics = MetricsFile(tmp_path)
    run_steps(metrics, 0, 4)
    metrics.log(5, {"loss": None})
    metrics.close()
    loss_plot(metrics.path, tmp_path / "loss.png")
    sizes = [(tmp_path / name).stat().st_size for name in ("empty.png", "loss.png")]
    assert 1000 < sizes[0] < sizes[1]
    trackers = track.Trackers(RankLog(tmp_path, 0), Console(), metrics)
    trackers.plot(tmp_path / "no" / "folder" / "loss.png")
    trackers.close()
    assert "could not be drawn" in caplog.text
