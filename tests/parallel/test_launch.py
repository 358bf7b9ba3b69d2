"""The local launcher, with small Python scripts as workers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatune.errors import ConfigError, ParallelError
from megatune.launch import report
from megatune.launch.local import run_local
from tests.helpers.processes import is_alive, wait_until

REPOSITORY = Path(__file__).parents[2]
START = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
rank = int(os.environ["RANK"])
here = Path(sys.argv[1])
def here_all(name):  # every rank has come to this line
    (here / f".{{name}}-{{rank}}").write_text(str(os.getpid()))
    os.rename(here / f".{{name}}-{{rank}}", here / f"{{name}}-{{rank}}")
    while len(list(here.glob(f"{{name}}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.005)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[str], list[str]]:
    """Command of a worker whose program is the given text, `rank` and the folder `here` at hand."""

    def make(text: str) -> list[str]:
        script = tmp_path / "worker.py"
        script.write_text(START.format(repository=str(REPOSITORY)) + textwrap.dedent(text))
        return [sys.executable, str(script), str(tmp_path)]

    return make


def test_every_rank_gets_its_variables(
    worker, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    command = worker(
        """
        (here / f"env-{rank}.json").write_text(json.dumps({**os.environ, "args": sys.argv[2:]}))
        print("output of", rank)
        """
    )
    logs = tmp_path / "logs"
    code = run_local(["train", "x.yaml"], 3, command=command, env={"EXTRA": "1"}, log_folder=logs)
    assert code == 0
    found = [json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(3)]
    for rank, env in enumerate(found):
        assert env["RANK"] == env["LOCAL_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "3"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["EXTRA"] == "1"
        assert env["args"] == ["train", "x.yaml"]
        assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 3)
    assert len({env["MASTER_PORT"] for env in found}) == 1
    names = [*(f"rank-{rank:05d}.log" for rank in range(3)), "node-0.log"]
    assert sorted(path.name for path in (logs / "gen-0").iterdir()) == sorted(names)
    for rank in range(3):
        assert (logs / "gen-0" / f"rank-{rank:05d}.log").read_text() == f"output of {rank}\n"
    assert capfd.readouterr().out == "output of 0\n"
    assert run_local([], 3, command=command, log_folder=logs) == 0
    assert (logs / "gen-1" / "rank-00002.log").read_text() == "output of 2\n"  # no older log is written to
    with pytest.raises(ParallelError, match="0 processes cannot be started"):
        run_local([], 0, command=command)


def test_a_failing_rank_ends_the_others_and_is_named(
    worker, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "gen-4").mkdir()
    (tmp_path / "gen-4" / "rank-00002.log").write_text("an older run's line\n")
    command = worker(
        """
        here_all("up")
        if rank == 2:
            print("what rank 2 said")
            raise ValueError("the reason")
        time.sleep(3600)
        """
    )
    assert run_local([], 3, command=command, log_folder=tmp_path) == 1
    said = capfd.readouterr().err
    host = socket.gethostname()
    assert (
        f"megatune: rank 2 of 3 ({host}) failed with exit code 1 while starting; the other 2 were ended"
        in said
    )
    assert "ValueError: the reason" in said
    assert "what rank 2 said" in said
    assert "older run" not in said
    assert f"output of rank 2: {tmp_path}/gen-5/rank-00002.log" in said
    assert "rank 2 of 3" in (tmp_path / "gen-5" / "node-0.log").read_text()
    pids = [int((tmp_path / f"up-{rank}").read_text()) for rank in range(3)]
    assert not any(is_alive(pid) for pid in pids)


def test_ranks_that_do_not_listen_and_what_they_started_are_killed(worker, tmp_path: Path) -> None:
    command = worker(
        """
        import subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        (here / f"child-{rank}").write_text(str(child.pid))
        here_all("up")
        if rank == 1:
            os._exit(7)
        time.sleep(3600)
        """
    )
    began = time.monotonic()
    assert run_local([], 2, command=command, log_folder=tmp_path, grace=0.3) == 7
    assert time.monotonic() - began > 0.3  # they were given that time
    pids = [int((tmp_path / f"{name}-{rank}").read_text()) for rank in range(2) for name in ("up", "child")]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_killed_rank_is_the_first_even_if_its_peers_report_before(worker, tmp_path: Path, capfd) -> None:
    command = worker(
        """
        from megatune.launch import report
        here_all("up")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while os.path.exists(f"/proc/{(here / 'up-1').read_text()}/fd/0"):
            pass
        report.record(ConnectionError("Connection closed by peer"))
        os._exit(1)
        """
    )
    assert run_local([], 3, command=command, log_folder=tmp_path) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert re.search(
        r"rank 1 of 3 \(.*\) was killed by SIGKILL \(by the kernel if memory ran out: see dmesg\)", said
    )
    assert "Connection closed" not in said


@pytest.mark.parametrize("ignores_sigterm", [True, False])
def test_the_first_report_counts_not_the_first_death(
    worker, tmp_path: Path, capfd, ignores_sigterm: bool
) -> None:
    command = worker(
        f"""
        from megatune.launch import report
        here_all("up")
        if rank == 0:
            try:
                raise RuntimeError("the cause")
            except RuntimeError as error:
                report.record(error)
            if {ignores_sigterm}:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (here / "cause-is-known").write_text("")
            time.sleep(0.5)  # a slow end, as with many threads
            sys.exit(1)
        while not (here / "cause-is-known").exists():
            time.sleep(0.005)
        report.record(ConnectionError("only the consequence"))
        sys.exit(1)
        """
    )
    assert run_local([], 2, command=command, log_folder=tmp_path) == 1
    said = capfd.readouterr().err
    assert re.search(r"rank 0 of 2 \(.*\) failed with exit code 1", said)
    assert "RuntimeError: the cause" in said
    assert "consequence" not in said


@pytest.mark.parametrize(
    ("bad", "how"),
    [
        ("rank == 0", "reported"),
        ("rank == 1", "reported"),
        ("True", "reported"),
        # A worker that knows nothing of reports: its last line is taken, rank 0's is on the terminal.
        ("rank == 0", "printed"),
        ("rank == 1", "printed"),
    ],
)
def test_a_user_error_is_said_exactly_once(worker, tmp_path: Path, capfd, bad: str, how: str) -> None:
    command = worker(
        f"""
        from megatune.errors import ConfigError
        from megatune.launch import report
        here_all("up")
        if {bad}:
            error = ConfigError("train.steps: -1 is wrong; use 1 or more")
            if {how == "printed"} or not report.record(error):
                print(f"megatune: {{error}}", file=sys.stderr)
            sys.exit(2)
        time.sleep(60)
        """
    )
    assert run_local([], 2, command=command) == 2
    said = capfd.readouterr()
    assert said.err == "megatune: train.steps: -1 is wrong; use 1 or more\n"
    assert said.out == ""


LAUNCHER = """
import sys
sys.path.insert(0, {repository!r})
from megatune.launch.local import run_local
assert "torch" not in sys.modules
sys.exit(run_local([], 2, command={command!r}, log_folder={logs!r}, grace=0.5))
"""


def start_launcher(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """A launcher of its own, with both workers up."""
    text = LAUNCHER.format(repository=str(REPOSITORY), command=command, logs=str(folder))
    launcher = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(folder.glob("ready-*"))) == 2)
    return launcher


COUNT_SIGNALS = """
received = []
def note(number, frame):
    received.append(signal.Signals(number).name)
    (here / f"signals-{rank}").write_text(" ".join(received))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
here_all("ready")
"""


def signals(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("signals-*"))]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_are_forwarded_once_and_a_clean_stop_is_waited_for(worker, tmp_path: Path, name: str) -> None:
    command = worker(
        COUNT_SIGNALS
        + textwrap.dedent(
            """
            while not received:
                time.sleep(0.005)
            while not (here / "again").exists():
                time.sleep(0.005)
            time.sleep(1.0 * rank)  # rank 1 takes longer than the grace time to save
            sys.exit(75)
            """
        )
    )
    launcher = start_launcher(command, tmp_path)
    launcher.send_signal(signal.Signals[name])
    wait_until(lambda: signals(tmp_path) == [name, name])
    if name != "SIGINT":
        launcher.send_signal(signal.Signals[name])
        time.sleep(0.1)
    (tmp_path / "again").write_text("")
    assert launcher.communicate(timeout=10)[1] == ""
    assert launcher.returncode == 75
    assert signals(tmp_path) == [name, name]


def test_a_second_interrupt_ends_it_after_the_grace_time(worker, tmp_path: Path) -> None:
    launcher = start_launcher(worker(COUNT_SIGNALS + "time.sleep(60)\n" * 5), tmp_path)
    launcher.send_signal(signal.SIGINT)
    wait_until(lambda: signals(tmp_path) == ["SIGINT"] * 2)
    time.sleep(0.7)  # longer than the grace time: it has not begun
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.communicate(timeout=5)[1] == ""
    assert launcher.returncode == 130
    assert signals(tmp_path) == ["SIGINT SIGINT"] * 2
    pids = [int((tmp_path / f"ready-{rank}").read_text()) for rank in range(2)]
    assert not any(is_alive(pid) for pid in pids)


def test_workers_that_take_the_signals_default_way_end_without_a_report(worker, tmp_path: Path) -> None:
    launcher = start_launcher(worker("here_all('ready')\ntime.sleep(60)"), tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.communicate(timeout=5)[1] == ""
    assert launcher.returncode == 75  # nothing was lost, and it may be started again


def test_no_worker_outlives_a_killed_launcher(worker, tmp_path: Path) -> None:
    launcher = start_launcher(worker("here_all('ready')\ntime.sleep(60)"), tmp_path)
    pids = [int((tmp_path / f"ready-{rank}").read_text()) for rank in range(2)]
    assert all(is_alive(pid) for pid in pids)
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)


def test_a_process_group_comes_up_on_the_reserved_port(worker, tmp_path: Path) -> None:
    command = worker(
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.tensor([rank + 1.0])
        dist.all_reduce(value)
        (here / f"sum-{rank}").write_text(str(value.item()))
        dist.destroy_process_group()
        """
    )
    assert run_local([], 2, command=command, log_folder=tmp_path) == 0
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]


def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(report.FAILURE_FILE, raising=False)
    assert report.record(ConfigError("x")) is False
    target = tmp_path / "rank-00000.json"
    assert report.recorded(target) is None
    monkeypatch.setenv(report.FAILURE_FILE, str(target))
    assert report.record(ConfigError("what, where")) is True
    assert report.recorded(target).text == "what, where"
    assert report.recorded(target).is_user_error
    assert report.record(ZeroDivisionError("bug")) is True
    assert "ZeroDivisionError: bug" in report.recorded(target).text
    assert not report.recorded(target).is_user_error
    target.write_text("{torn")
    assert report.recorded(target) is None
    monkeypatch.setenv(report.FAILURE_FILE, str(tmp_path / "no" / "folder"))
    assert report.record(ConfigError("x")) is False
