"""Agents of several nodes, all on this machine, with small Python scripts as ranks; what they decide, without any."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatune import cli
from megatune.errors import ParallelError
from megatune.launch import network, wire
from megatune.launch.agent import Job, run_job
from megatune.launch.coordinator import Coordinator
from megatune.launch.report import Death
from megatune.launch.restart import Restarts
from megatune.launch.watch import Limits, hanging
from megatune.training import heartbeat as hb
from megatune.training.heartbeat import Beat, Heartbeat, Reader
from tests.parallel.test_launch import REPOSITORY, is_alive, wait_until, worker  # noqa: F401  (a fixture)

AGENT = """
import sys
sys.path.insert(0, {repository!r})
from pathlib import Path
import megatune.launch.rank
from megatune.launch.agent import Job, run_job
assert "torch" not in sys.modules
sys.exit(run_job(Job(command={command!r}, logs=Path({logs!r}), nodes={nodes}, node={node}, nproc={nproc},
    endpoint=("127.0.0.1", {port}), run_id={run_id!r}, secret={secret!r}, restarts={restarts}, join_timeout={join},
    grace=1.0)))
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def agents(tmp_path: Path, port: int) -> Iterator:
    """Starts agents: agents(command, node, ...) -> process."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], node: int, **options) -> subprocess.Popen[str]:
        settings = {
            "nodes": 2, "nproc": 1, "run_id": "a run", "secret": "a secret", "restarts": 0, "join": 20.0
        } | options  # fmt: skip
        text = AGENT.format(
            repository=str(REPOSITORY),
            command=command,
            node=node,
            port=port,
            logs=str(tmp_path / "logs"),
            **settings,
        )
        process = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(*processes: subprocess.Popen[str]) -> tuple[list[int], list[str]]:
    said = [process.communicate(timeout=90)[1] for process in processes]
    return [process.returncode for process in processes], said


def test_ranks_of_two_nodes_make_one_job(worker, agents, tmp_path: Path, port: int) -> None:  # noqa: F811
    command = worker(
        """
        here_all("up")
        (here / f"env-{rank}.json").write_text(json.dumps(dict(os.environ)))
        print("output of", rank)
        """
    )
    codes, said = end(agents(command, 1, nproc=1), agents(command, 0, nproc=2))
    assert (codes, said) == ([0, 0], ["", ""])
    found = [json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(3)]
    for rank, (local, size) in enumerate([(0, 2), (1, 2), (0, 1)]):
        env = found[rank]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(local))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("3", str(size))
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["GLOO_SOCKET_IFNAME"] == "lo"
        assert wire.SECRET not in env
    assert len({env["MASTER_PORT"] for env in found}) == 1 and found[0]["MASTER_PORT"] != str(port)
    names = sorted(path.name for path in (tmp_path / "logs" / "gen-0").iterdir())
    assert names == ["node-0.log", "node-1.log", *(f"rank-{rank:05d}.log" for rank in range(3))]


def test_a_death_on_one_node_starts_all_again(worker, agents, tmp_path: Path) -> None:  # noqa: F811
    command = worker(
        """
        again = (here / "failed").exists()
        (here / f"port-{int(again)}-{rank}").write_text(os.environ["MASTER_PORT"])
        here_all(f"up-{int(again)}")
        if not again and rank == 1:
            (here / "failed").touch()
            raise ValueError("the reason")
        if not again:
            time.sleep(3600)
        """
    )
    codes, said = end(agents(command, 0, restarts=2), agents(command, 1, restarts=2))
    assert codes == [0, 0], said
    assert f"rank 1 of 2 on {socket.gethostname()} failed with exit code 1 while starting" in said[0]
    assert "ValueError: the reason" in said[0]
    assert "starting again from the newest checkpoint (restart 1 of 2 without progress)" in said[0]
    assert said[1] == ""  # one report
    ports = [{(tmp_path / f"port-{again}-{rank}").read_text() for rank in range(2)} for again in range(2)]
    assert all(len(found) == 1 for found in ports) and ports[0] != ports[1]
    assert (tmp_path / "logs" / "gen-1" / "rank-00001.log").exists()


def test_missing_and_unreachable_nodes_are_named(worker, agents) -> None:  # noqa: F811
    command = worker("")
    codes, said = end(
        agents(command, 0, nodes=4, join=1.0), agents(command, 2, nodes=4, join=1.0, secret="x")
    )
    assert codes == [76, 76]
    assert "nodes 1, 2, 3 of 4 did not come within 1 s" in said[0]
    assert "node 2 cannot reach node 0's agent at 127.0.0.1:" in said[1]
    assert "(run id, generation or secret differ)" in said[1] or "nothing answers there" in said[1]


def test_strangers_are_not_let_in(worker, agents, tmp_path: Path, port: int) -> None:  # noqa: F811
    command = worker("here_all('up')")
    first = agents(command, 0)
    wait_until(lambda: _listens(port))
    strangers = []
    for said in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 100_000,
        b'{"node": 1, "nonce": "0", "proof": "0"}\n',
        b'{"node": 1, "nonce": 0, "proof": null}\n',
        b'{"node": 7, "nonce": "0", "proof": "\xc3\xa4"}\n{"kind": "hello"}\n',
        b"[" * 5000 + b"\n",
        b'{"kind": "hello", "nproc": 1, "host": "x"}\n',
    ):
        stranger = socket.create_connection(("127.0.0.1", port), 5)
        stranger.sendall(said)
        strangers.append((stranger, said))
    time.sleep(0.5)
    for stranger, said in strangers[1:]:
        stranger.settimeout(5)
        try:
            answer = stranger.recv(4096)  # its nonce, which is all that they get
            while more := stranger.recv(4096):
                answer += more
        except ConnectionResetError:
            answer = b""
        assert b"proof" not in answer, said
    other = agents(command, 1)
    assert end(first, other) == ([0, 0], ["", ""])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_a_lost_agent_ends_the_others(worker, agents, tmp_path: Path) -> None:  # noqa: F811
    command = worker("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nhere_all('up')\ntime.sleep(3600)")
    first, second = agents(command, 0, restarts=3), agents(command, 1, restarts=3)
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2, 20)
    pids = [int((tmp_path / f"up-{rank}").read_text()) for rank in range(2)]
    second.kill()
    codes, said = end(first)
    assert codes == [76]
    assert f"node 1 ({socket.gethostname()}) is lost" in said[0]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_the_verb_refuses_what_cannot_be(tmp_path: Path, monkeypatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {path: m}\ndata: {train: [d]}\ncheckpoint: {folder: f}\n")
    words = ["agent", "--run-id", "x", "--nproc", "1", "--logs", str(tmp_path / "logs")]

    def refused(*more: str) -> str:
        result = CliRunner().invoke(cli.commands, [*words, *more])
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        return line

    two = ("--nodes", "2", "--endpoint", "n:1")
    monkeypatch.delenv(wire.SECRET, raising=False)
    assert "--node-rank 2" in refused(*two, "--node-rank", "2", "--", "train", str(config))
    assert "MEGATUNE_SECRET is not set" in refused(*two, "--node-rank", "0", "--", "train", str(config))
    assert "an agent runs `train" in refused(*two, "--node-rank", "0", "--", "chat", "x")
    assert "optim.nothing" in refused(*two, "--node-rank", "0", "--", "train", str(config), "optim.nothing=1")
    for bad in ("n", "n:", ":1", "n:0", "n:65536", "n:²"):
        with pytest.raises(ParallelError, match="must read HOST:PORT"):
            network.split_endpoint(bad)
    assert network.split_endpoint("[fe80::1]:20") == ("fe80::1", 20)
    with pytest.raises(ParallelError, match="0 processes"):
        run_job(Job([], 0, tmp_path))


# What is decided, without processes.


def beat(step: int, phase: int, silent: float, done_here: int = 3, longest: float = 0.0) -> Beat:
    return Beat(step, phase, silent, done_here, step - 1, 0, longest)


def test_hangs_and_slow_runs() -> None:
    limits = Limits(hang=10, collective=100)
    waiting = (0, beat(7, hb.REDUCE, 11))
    assert hanging([waiting, (1, beat(7, hb.FORWARD, 12))], limits) == (1, beat(7, hb.FORWARD, 12))
    assert hanging([waiting, (1, beat(7, hb.FORWARD, 9))], limits) is None
    for phase in (hb.FETCH, hb.EVALUATE, hb.SAVE, hb.CHECKPOINT):
        assert hanging([waiting, (1, beat(7, phase, 49))], limits) is None
        assert hanging([waiting, (1, beat(7, phase, 51))], limits) is not None
    for phase in (hb.START, hb.END):
        assert hanging([waiting, (1, beat(7, phase, 399))], limits) is None
        assert hanging([waiting, (1, beat(7, phase, 401))], limits) is not None
    assert hanging([(0, beat(1, hb.FORWARD, 49, done_here=0))], limits) is None  # compiling
    assert hanging([(0, beat(1, hb.FORWARD, 51, done_here=0))], limits) is not None
    assert hanging([(0, beat(9, hb.REDUCE, 29, longest=6))], limits) is None  # its steps are slow
    assert hanging([(0, beat(9, hb.REDUCE, 31, longest=6))], limits) is not None
    assert hanging([(0, beat(9, hb.REDUCE, 1e9))], Limits(0, 100)) is None
    assert hanging([], limits) is None


def death(step: int, *, text: str = "x", reported: bool = True) -> Death:
    return Death(0, "h", 1, 0.0, step, "", text, "", False, reported, True)


def test_restarts_end_without_progress() -> None:
    rule = Restarts(2)
    rule.seen(5, 4)
    assert rule.stop_reason(death(6)) is None
    rule.seen(4, 4)
    assert rule.stop_reason(death(5)) is None
    rule.seen(4, 4)
    assert "2 restarts brought it no further than step 5" in rule.stop_reason(death(4))
    rule = Restarts(1)
    for finished in range(1, 6):  # each start gets further
        rule.seen(finished, 0)
        assert rule.stop_reason(death(finished + 1)) is None
    rule.seen(4, 4)  # no further step, but a new checkpoint
    assert rule.stop_reason(death(5)) is None


def test_what_always_fails_is_not_tried_again() -> None:
    rule = Restarts(9)
    rule.seen(5, 4)
    assert rule.stop_reason(death(6)) is None
    assert "step 6 failed twice in a row" in rule.stop_reason(death(6))
    rule = Restarts(9)
    assert rule.stop_reason(death(0, text="a\nValueError: 1")) is None
    assert rule.stop_reason(death(0, text="a\nOSError: port")) is None
    assert "with the same error" in rule.stop_reason(death(0, text="b\nOSError: port"))
    rule = Restarts(2)
    killed = [rule.stop_reason(death(0, text="", reported=False)) for _ in range(3)]
    assert killed[:2] == [None, None] and "2 restarts" in killed[2]
    assert Restarts(0).stop_reason(death(3)) == ""
    pauses = []
    for used in range(1, 9):
        pauses.append(Restarts(9, used=used).pause)
    assert pauses == sorted(pauses) and pauses[0] < 1 and pauses[-1] == 30


@pytest.fixture
def lead() -> Coordinator:
    ports, said = iter(range(1000, 2000)), []
    found = Coordinator(
        nodes=2,
        address="n0",
        restarts=Restarts(3),
        limits=Limits(10, 100),
        grace=4,
        join_timeout=60,
        generation=7,
        reserve=lambda: next(ports),
        say=said.append,
    )
    found.said = said
    found.handle(0, {"kind": "hello", "nproc": 2, "host": "a"}, 0.0)
    assert not found.outbox
    found.handle(1, {"kind": "hello", "nproc": 1, "host": "b"}, 0.0)
    return found


def orders(lead: Coordinator) -> list[tuple[int, str]]:
    found = [(node, order["kind"]) for node, order in lead.outbox]
    lead.outbox.clear()
    return found


def ended(*codes: int, finished: int = 0, saved: int = 0) -> dict:
    return {"kind": "ended", "codes": list(codes), "finished": finished, "saved": saved}


DIED = {
    "kind": "death", "rank": 2, "code": 137, "ago": 0.0, "step": 3, "where": "in step 3, forward", "text": "",
    "log": "l", "is_user_error": False, "is_reported": False, "is_first_hand": True,
}  # fmt: skip


def test_a_death_ends_all_and_another_port_is_used(lead: Coordinator) -> None:
    assert [order["first"] for _, order in lead.outbox] == [0, 2]
    assert {(order["generation"], order["world_size"], order["port"]) for _, order in lead.outbox} == {
        (7, 3, 1000)
    }
    orders(lead)
    lead.handle(1, DIED, 1.0)
    assert orders(lead) == [(0, "end"), (1, "end")]
    # A peer's complaint came earlier, but only because a killed process says nothing.
    lead.handle(0, DIED | {"rank": 0, "code": 1, "ago": 0.0, "text": "peer", "is_reported": True}, 1.5)
    lead.handle(1, ended(137, finished=2), 2.0)
    lead.handle(0, ended(1, 0, finished=2), 2.0)
    assert "rank 2 of 3 on b was killed by SIGKILL" in lead.said[0] and "in step 3, forward" in lead.said[0]
    assert lead.state == "waiting"
    lead.tick(2.1)
    assert not lead.outbox
    lead.tick(60.0)
    assert {(order["generation"], order["port"]) for _, order in lead.outbox} == {(8, 1001)}


def test_clean_ends_and_mistakes(lead: Coordinator) -> None:
    second = replace(lead, outbox=[], _joined={}, _deaths=[], _signals=set(), _lost={})
    lead.handle(0, ended(0, 75), 1.0)
    assert lead.code is None
    lead.handle(1, ended(75), 2.0)
    assert lead.code == 75
    second.state = "joining"
    for node in range(2):
        second.handle(node, {"kind": "hello", "nproc": 1, "host": "a"}, 0.0)
    second.handle(1, DIED | {"rank": 1, "code": 2, "text": "key: wrong", "is_user_error": True}, 1.0)
    second.handle(0, ended(143), 2.0)
    second.handle(1, ended(2), 2.0)
    assert second.code == 2
    assert lead.said == ["key: wrong"]


def test_a_rank_that_fails_while_stopping_asks_for_another_start(lead: Coordinator) -> None:
    lead.handle(0, {"kind": "stop", "signal": int(signal.SIGTERM)}, 0.5)
    lead.handle(1, DIED, 1.0)
    lead.handle(0, ended(137, 137), 2.0)
    lead.handle(1, ended(137), 2.0)
    assert lead.code == 76


def test_a_lost_node_is_not_waited_for(lead: Coordinator) -> None:
    orders(lead)
    lead.lost(1, 1.0, "gone")
    assert orders(lead) == [(0, "end")]
    lead.handle(0, ended(137, 137), 2.0)
    assert orders(lead) == [(0, "exit")]
    assert lead.code == 76
    assert "node 1 (b) is lost: gone" in lead.said[0]


def test_a_job_that_was_stopped_as_a_whole_does_not_hang(lead: Coordinator, tmp_path: Path) -> None:
    def say(silent: float) -> None:
        for node, rank in ((0, 0), (0, 1), (1, 2)):
            ranks = [[rank, *vars(beat(7, hb.REDUCE, silent)).values()]]
            lead.handle(node, {"kind": "beats", "ranks": ranks}, 100.0)

    say(1.0)
    lead.tick(108.0)
    assert lead.state == "running"
    lead.awakened()
    lead.tick(500.0)
    assert lead.state == "running"
    say(1.0)
    lead.tick(110.0)
    assert lead.state == "dumping", "silent for 11 s by now"
    reader = Reader(tmp_path / "beat")
    Heartbeat(reader.path).begin(1)
    time.sleep(0.05)
    assert reader.read().silent >= 0.05 > reader.read(time.monotonic()).silent


def test_heartbeats(tmp_path: Path, monkeypatch) -> None:
    reader = Reader(tmp_path / "beat")
    assert reader.read().where == "while starting"
    writer = Heartbeat(reader.path)
    writer.begin(1)
    writer.phase(hb.BACKWARD)
    found = reader.read()
    assert (found.step, found.phase, found.done_here) == (1, hb.BACKWARD, 0)
    assert found.where == "in step 1, backward" and found.silent < 5
    assert found.longest == 0  # the first step does not count
    writer.finished(1)
    writer.begin(2)
    time.sleep(0.02)
    writer.phase(hb.FORWARD)
    writer.saved(1)
    writer.finished(2)
    writer.phase(hb.SAVE)
    found = reader.read()
    assert (found.finished, found.saved, found.done_here) == (2, 1, 2)
    assert 0.02 <= found.longest < 5
    assert found.where == "after step 2, save"
    monkeypatch.delenv(hb.HEARTBEAT_FILE, raising=False)
    assert hb.heartbeat() is hb.heartbeat()
    monkeypatch.setenv(hb.HEARTBEAT_FILE, str(reader.path))
    hb.heartbeat().begin(9)
    assert reader.read().step == 9
    called = []
    sys.setprofile(lambda frame, event, function: event == "c_call" and called.append(function))
    writer.phase(hb.FORWARD)
    sys.setprofile(None)
    assert called == [time.monotonic_ns, sys.setprofile]  # a few stores; no system call
    assert os.path.getsize(reader.path) == 64
