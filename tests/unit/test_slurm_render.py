"""The batch script: what its values mean to bash, what its directives may hold, what it does with containers."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatune.config.schema import Config
from megatune.errors import ConfigError
from megatune.launch.slurm.quoting import bash_word, directive_word
from megatune.launch.slurm.script import CODE, VALUES_END, render, values_section
from megatune.training.grace import GRACE_FILE, Grace

VALUES = int(os.environ.get("MEGATUNE_FUZZ", 2000))
PIECES = (
    *(
        "'",
        '"',
        "\\",
        "`",
        "$(touch pwned)",
        "`touch pwned`",
        "${HOME}",
        "$HOME",
        "$'x'",
        "\n",
        "\r",
        "\t",
        "\r\n",
    ),
    *(
        "#",
        " #",
        "!",
        "!!",
        "*",
        "?",
        "[a-z]",
        "{a,b}",
        "~",
        ";",
        "&",
        "&&",
        "|",
        "<",
        ">",
        ">(touch pwned)",
        "(",
        ")",
    ),
    *(
        "-",
        "--",
        "--x=1",
        "-rf /",
        "=",
        "%j",
        "%",
        ":",
        ",",
        "\\n",
        "\\x41",
        "\\'",
        "'\"'\"'",
        "EOF",
        "<<EOF\n",
        " ",
    ),
    *(
        "é",
        "日本",
        "\u202e",
        "\ufeff",
        "\x7f",
        "\x01",
        "\x1b[31m",
        "\udce9",
        "\U0001f600",
        "\u2028",
        "\xa0",
        "a",
        "B7",
    ),
)


def values(count: int, seed: int) -> list[str]:
    """Half are made of pieces that mean something to some layer, half of any characters at all."""
    chance = random.Random(seed)
    found = ["", *PIECES][:count]
    while len(found) < count:
        if chance.random() < 0.5:
            found.append("".join(chance.choices(PIECES, k=chance.randint(1, 8))))
        else:
            codes = (chance.choice((0x7F, 0x7FF, 0xD7FF, 0x10FFFF)) for _ in range(chance.randint(1, 12)))
            text = "".join(chr(chance.randint(1, top)) for top in codes)
            found.append("".join(c for c in text if not 0xD800 <= ord(c) <= 0xDFFF))
    return found


def config(folder: str = "runs/x", launch: dict[str, Any] | None = None, **slurm: Any) -> Config:
    settings = {"model": {"path": "m"}, "data": {"train": ["t"]}, "checkpoint": {"folder": folder}}
    return Config.model_validate({**settings, "launch": launch or {}, "slurm": slurm})


def read_back(sections: list[bytes], names: list[str], folder: Path, locale: str) -> list[list[bytes]]:
    """What bash has in these variables after each section, all in one process."""
    shown = " ".join(f'"${{{name}[@]}}"' for name in names)
    program = b"".join(
        b"%s\nprintf '%%s\\0' %s\nprintf '\\1\\0'\n" % (part, shown.encode()) for part in sections
    )
    done = subprocess.run(
        ["bash"],
        input=program,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "LC_ALL": locale},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    found: list[list[bytes]] = [[]]
    for word in done.stdout.split(b"\0")[:-1]:
        if word == b"\1":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_values_come_out_of_bash_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    monkeypatch.chdir(tmp_path)
    every = [value for value in values(VALUES, seed=5) if value != "\1"]
    sections, expected = [], []
    for start in range(0, len(every), 8):
        given = every[start : start + 8]  # arguments may be any bytes, configurations are Unicode
        some = [value.replace("\udce9", "ä") for value in given]
        one = config(
            env={f"V{number}": value for number, value in enumerate(some)},
            python=some[0] or "python",
            srun_options=some,
            container={"runtime": "apptainer", "image": some[-1] or "i", "options": some[::-1]},
        )
        script = render(one, "c.yaml", given).script
        # Nothing of a value is code: what follows the values is the same in every script.
        assert script[script.index(VALUES_END) :].endswith(CODE.read_bytes())
        assert script.count(VALUES_END) == 1
        sections.append(values_section(script))
        words = [f"V{number}={value}" for number, value in enumerate(some)]
        words += [some[0] or "python", *some, some[-1] or "i", *some[::-1], *given]
        expected.append([word.encode("utf-8", "surrogateescape") for word in words])
    names = ["environment", "python", "srun_options", "image", "container_options", "overrides"]
    assert read_back(sections, names, tmp_path, locale) == expected
    assert not list(tmp_path.iterdir())  # nothing was run


def test_a_nul_and_half_a_character_are_refused() -> None:
    for changes in ({"env": {"X": "a\0"}}, {"job_name": "a\0"}, {"options": {"comment": "a\0"}}):
        with pytest.raises(ConfigError, match="NUL"):
            render(config(**changes), "c.yaml")
    for value, word in (("a\0b", "NUL"), ("a\ud800", "surrogate")):
        with pytest.raises(ConfigError, match=f"an override: holds .*{word}"):
            render(config(), "c.yaml", [value])


def test_words() -> None:
    assert bash_word("a/b.c:1=2") == "a/b.c:1=2"
    assert bash_word("") == "''"
    assert bash_word("a b$") == "'a b$'"
    assert bash_word("it's\n\xe9") == "$'it\\'s\\n\\xc3\\xa9'"
    assert directive_word("a b", "k") == b'"a b"'
    assert directive_word('a"\\', "k") == b'"a\\"\\\\"'
    assert directive_word("gpu:8", "k") == b"gpu:8"


def directive_lines(script: bytes) -> list[str]:
    return [line.decode() for line in script.splitlines() if line.startswith(b"#SBATCH ")]


def test_directives() -> None:
    one = config(
        nodes=4, min_nodes=2, gpus="h100:8", cpus=96, memory=0, time="1-12:00:00", partition="long", account="p1",
        qos="high", constraint="ib&(a|b)", reservation="r", nodelist="n[1-9]", exclude="n3", exclusive=True,
        mail_user="a@b.c", mail_type=["END", "FAIL"], job_name="my job", requeue=False, grace=120,
        options={"gres": "gpu:8", "gpu_bind": "none", "hold": True, "spread-job": False, "nice": 5,
                 "licenses": ["a", "b"]},
    )  # fmt: skip
    lines = directive_lines(render(one, "c.yaml").script)
    assert lines[:16] == [
        '#SBATCH --job-name="my job"',
        "#SBATCH --nodes=2-4",
        "#SBATCH --gpus-per-node=h100:8",
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --mem=0",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=long",
        "#SBATCH --account=p1",
        "#SBATCH --qos=high",
        '#SBATCH --constraint="ib&(a|b)"',
        "#SBATCH --reservation=r",
        '#SBATCH --nodelist="n[1-9]"',
        "#SBATCH --exclude=n3",
        "#SBATCH --mail-user=a@b.c",
        "#SBATCH --mail-type=END,FAIL",
        "#SBATCH --exclusive",
    ]
    assert "#SBATCH --ntasks-per-node=1" in directive_lines(render(config(nodes=4), "c.yaml").script)
    assert "#SBATCH --signal=B:USR1@120" in lines and "#SBATCH --no-requeue" in lines
    assert lines[-5:] == [
        "#SBATCH --gres=gpu:8",
        "#SBATCH --gpu-bind=none",
        "#SBATCH --hold",
        "#SBATCH --nice=5",
        "#SBATCH --licenses=a,b",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"options": {"partition": "x"}},
            r"slurm\.options\.partition: --partition cannot be passed on: use slurm",
        ),
        ({"options": {"wrap": "rm -rf /"}}, "it would replace the job's script"),
        ({"options": {"wra": "rm -rf /"}}, "sbatch would read --wra as --wrap"),
        ({"options": {"arr": "1-3"}}, "sbatch would read --arr as --array"),
        ({"options": {"x=1 --hold": True}}, "is not the long name of an option"),
        ({"options": {"p": "x"}}, "is not the long name of an option"),
        ({"options": {"comment": "a\n#SBATCH --hold"}}, "holds a control character or a line end"),
        ({"partition": "a\nb"}, r"slurm\.partition: 'a\\nb' holds a control character"),
        ({"options": {"comment": "x" * 1001}}, "1001 bytes; Slurm takes at most 1000"),
    ],
)
def test_directives_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(config(**changes), "c.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": {"A B": "1"}}, "letters, digits and _ make a name"),
        ({"env": {"SLURM_JOB_ID": "1"}}, "SLURM_ is Slurm's own"),
        ({"env": {"X": True}}, "X is a truth value"),
        ({"time": "soon"}, "is no time limit"),
        ({"time": 5, "grace": 300}, "the job lives only 300 s"),
        ({"nodes": 2, "min_nodes": 3}, "min_nodes is 3, above nodes: 2"),
        ({"nodes": True}, "must be a number"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = directive_lines(render(config("100% 'x'"), "c.yaml").script)
    assert f"#SBATCH --output=\"{tmp_path}/100%% 'x'/slurm/%j.out\"" in lines
    with pytest.raises(ConfigError, match="holds a backslash"):
        render(config("a\\b"), "c.yaml")
    with pytest.raises(ConfigError, match="control character"):
        render(config("a\nb"), "c.yaml")


def test_grace_follows_the_measured_saves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def notice(**slurm: Any) -> int:
        lines = directive_lines(render(config(str(folder), **slurm), "c.yaml").script)
        (line,) = [line for line in lines if "--signal" in line]
        return int(line.rpartition("@")[2])

    assert notice() == 300
    assert notice(time=8) == 120  # a quarter of the limit
    assert notice(grace=77) == 77
    grace = Grace(folder, step_seconds=2.0, save_seconds=100.0)
    assert grace.write()
    assert notice() == round(1.2 * grace.grace_seconds) == 260
    assert notice(time="1:00:00") == 260
    (folder / GRACE_FILE).write_text("{torn")
    assert notice() == 300


def test_containers_get_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    container = {"runtime": "pyxis", "image": "a.sqsh", "mounts": ["/data", "/x:/y:ro"]}
    script = render(config("/runs/x", container=container), "/etc/c.yaml").script
    (line,) = [line for line in script.decode().splitlines() if line.startswith("mounts=")]
    own = [f"{place}:{place}" for place in (tmp_path, "/runs/x", "/etc")]
    assert line == f"mounts=({' '.join([*own, '/data:/data', '/x:/y:ro'])})"
    assert b"\npython=python\n" in script
    for mount in ("a,b", "", "a:b:c:d"):
        with pytest.raises(ConfigError, match=r"slurm\.container\.mounts"):
            render(config(container={**container, "mounts": [mount]}), "c.yaml")
    with pytest.raises(ConfigError, match="colon or a comma"):
        render(config("/runs/a,b", container=container), "c.yaml")


def test_the_script_is_bash(tmp_path: Path) -> None:
    script = render(config(), "c.yaml").script
    assert subprocess.run(["bash", "-n"], input=script, check=False).returncode == 0
    assert script == render(config(), "c.yaml").script
