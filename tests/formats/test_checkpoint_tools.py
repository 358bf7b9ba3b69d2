"""`megatune inspect`, `diff` and `average`, and the scripts in tools/ of the same."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatune.checkpoint.convert import core
from megatune.checkpoint.convert.average import ema_weights, mean_weights
from megatune.checkpoint.convert.base import Options
from megatune.cli import commands
from megatune.errors import ConfigError
from tests.helpers.deepspeed_files import Case, write
from tests.helpers.tiny import make_llama

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf"), hidden=16, heads=2, kv_heads=1, mlp=24)


def _changed(source: Path, folder: Path, **tensors: Tensor | None) -> Path:
    """A copy with other values (None: without the tensor); names with `__` for the dots."""
    shutil.copytree(source, folder)
    found = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        name = name.replace("__", ".")
        if value is None:
            del found[name]
        else:
            found[name] = value
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _deepspeed(hf: Path, folder: Path, stage: int = 3) -> Path:
    masters = load_file(hf / "model.safetensors")
    moments = {
        slot: {name: one.square() for name, one in masters.items()} for slot in ("exp_avg", "exp_avg_sq")
    }
    write(folder, {"master": masters, **moments}, Case(stage, 2, torch.float32), step=9)
    shutil.copy(hf / "config.json", folder)
    return folder


# What is it?


def test_inspect_a_hugging_face_folder(hf: Path) -> None:
    found = _run("inspect", hf, "--json")
    facts = json.loads(found.output)
    tensors = load_file(hf / "model.safetensors")
    assert found.exit_code == 0
    assert (facts["format"], facts["wrong"], facts["checked"]) == ("hf", None, False)
    assert facts["parameters"] == sum(one.numel() for one in tensors.values())
    assert facts["dtypes"] == {"F32": len(tensors)}
    assert facts["bytes"] == 4 * facts["parameters"] and facts["disk_bytes"] > facts["bytes"]


def test_inspect_says_layout_step_and_states(hf: Path, tmp_path: Path) -> None:
    text = _run("inspect", _deepspeed(hf, tmp_path / "ds")).output
    assert "deepspeed" in text and "ZeRO stage 3 over 2 ranks" in text and "9" in text
    count = len(load_file(hf / "model.safetensors"))
    assert f"master of {count}, exp_avg of {count}, exp_avg_sq of {count}" in text
    assert "ZeRO stage 1 or 2 over 2 ranks" in _run("inspect", _deepspeed(hf, tmp_path / "z2", 2)).output


@pytest.mark.parametrize(
    ("to", "options", "layout"),
    [
        ("megatron", Options(tensor=2, pipeline=2), "tensor 2 x pipeline"),
        ("torch_dist", Options(), "global tensors"),
        ("megatune", Options(), "global tensors"),
    ],
)
def test_inspect_what_conversions_write(to: str, options: Options, layout: str, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf")
    core.convert(source, tmp_path / "made", to, options)
    found = _run("inspect", tmp_path / "made", "--full", "--like", source)
    assert found.exit_code == 0, found.output
    assert layout in found.output and "every byte read" in found.output


def test_inspect_tells_what_is_wrong(hf: Path, tmp_path: Path) -> None:
    found = _run("inspect", _changed(hf, tmp_path / "a", model__norm__weight=None))
    assert found.exit_code == 1 and NORM in found.output
    cut = _changed(hf, tmp_path / "b")
    os.truncate(cut / "model.safetensors", 3000)
    found = _run("inspect", cut)
    assert found.exit_code == 1 and "truncated" in found.output
    found = _run(
        "inspect", _changed(hf, tmp_path / "c", model__norm__weight=torch.full((16,), torch.nan)), "--full"
    )
    assert found.exit_code == 1 and "not finite" in found.output and NORM in found.output
    (tmp_path / "empty").mkdir()
    found = _run("inspect", tmp_path / "empty")
    assert found.exit_code == 2 and "is no checkpoint" in found.output


def test_a_flipped_bit_is_found_by_the_digests_of_a_conversion(hf: Path, tmp_path: Path) -> None:
    core.convert(hf, tmp_path / "made", "hf", Options())
    assert _run("inspect", tmp_path / "made", "--full").exit_code == 0
    file = tmp_path / "made" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert _run("inspect", tmp_path / "made").exit_code == 0
    found = _run("inspect", tmp_path / "made", "--full")
    assert found.exit_code == 1 and "megatune-digests.json" in found.output


# What differs?


def test_diff_of_equal_checkpoints_in_two_formats(hf: Path, tmp_path: Path) -> None:
    found = _run("diff", hf, _deepspeed(hf, tmp_path / "ds"))
    assert (found.exit_code, found.output) == (0, "equal\n")
    two = _run("diff", tmp_path / "ds", _deepspeed(hf, tmp_path / "z2", 2))
    assert (two.exit_code, two.output) == (0, "equal\n")


def test_diff_says_how_much(hf: Path, tmp_path: Path) -> None:
    weights = load_file(hf / "model.safetensors")
    norm, embed = weights[NORM].clone(), weights[EMBED].clone()
    norm[3] += 0.5
    embed[7] = 0
    other = _changed(hf, tmp_path / "b", model__norm__weight=norm, model__embed_tokens__weight=embed)
    found = _run("diff", hf, other)
    assert found.exit_code == 1
    rows = {line.split()[-1]: line.split() for line in found.output.splitlines()[1:-1]}
    assert rows.keys() == {NORM, EMBED}
    assert rows[NORM][2] == "1" and float(rows[NORM][0]) == pytest.approx(0.5, rel=1e-3)
    assert float(rows[NORM][1]) == pytest.approx(0.5 / float(weights[NORM].norm()), rel=1e-3)
    assert rows[EMBED][2] == "16"
    assert float(rows[EMBED][0]) == pytest.approx(float(weights[EMBED][7].abs().max()), rel=1e-3)


def test_diff_sees_signs_of_nothing_dtypes_and_states(hf: Path, tmp_path: Path) -> None:
    nan = torch.full((16,), torch.nan)
    a = _changed(hf, tmp_path / "a", model__norm__weight=nan)
    assert _run("diff", a, _changed(hf, tmp_path / "b", model__norm__weight=nan)).exit_code == 0
    assert _run("diff", a, hf).exit_code == 1
    half = _changed(
        hf, tmp_path / "c", model__norm__weight=load_file(hf / "model.safetensors")[NORM].double()
    )
    found = _run("diff", hf, half)
    assert found.exit_code == 1 and "float32 against float64" in found.output
    first = _deepspeed(hf, tmp_path / "d")
    masters = load_file(hf / "model.safetensors")
    states = {"master": masters, "exp_avg": masters, "exp_avg_sq": masters}
    write(tmp_path / "e", states, Case(1, 3, torch.float32))
    found = _run("diff", first, tmp_path / "e", "--like", hf)
    assert found.exit_code == 1 and "exp_avg of model.norm.weight" in found.output
    assert _run("diff", first, tmp_path / "e", "--like", hf, "--no-optimizer").exit_code == 0


def test_diff_of_what_cannot_be_read(hf: Path, tmp_path: Path) -> None:
    assert _run("diff", hf, tmp_path / "none").exit_code == 2
    found = _run("diff", hf, _changed(hf, tmp_path / "b", model__norm__weight=None))
    assert found.exit_code == 2 and NORM in found.output


# Means.


def test_average_of_checkpoints(hf: Path, tmp_path: Path) -> None:
    first = load_file(hf / "model.safetensors")
    second = {name: one + 1 for name, one in first.items()}
    other = _changed(hf, tmp_path / "b", **{name.replace(".", "__"): one for name, one in second.items()})
    found = _run("average", hf, other, "-o", tmp_path / "mean", "--weights", "3,1")
    assert found.exit_code == 0, found.output
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean.keys() == first.keys()
    for name, one in first.items():
        exact = (0.75 * one.double() + 0.25 * second[name].double()).float()
        assert torch.equal(mean[name], exact), name
    assert (tmp_path / "mean" / "tokenizer.json").is_file()
    assert _run("inspect", tmp_path / "mean").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "mean"]


def test_the_mean_of_equal_checkpoints_is_the_same(hf: Path, tmp_path: Path) -> None:
    ds = _deepspeed(hf, tmp_path / "ds")
    assert _run("average", hf, ds, hf, "-o", tmp_path / "mean").exit_code == 0
    assert _run("diff", hf, tmp_path / "mean").exit_code == 0
    assert _run("average", hf, ds, "-o", tmp_path / "half", "--dtype", "bf16", "--ema", "0.9").exit_code == 0
    halves = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(halves[EMBED], load_file(hf / "model.safetensors")[EMBED].bfloat16())


def test_shares() -> None:
    assert mean_weights(4, None) == [0.25] * 4
    assert mean_weights(2, [1, 3]) == [0.25, 0.75]
    values, average = [5.0, 7.0, 1.0], 5.0
    for value in values[1:]:
        average = 0.9 * average + 0.1 * value
    shares = ema_weights(3, 0.9)
    assert sum(share * value for share, value in zip(shares, values, strict=True)) == pytest.approx(average)
    assert sum(shares) == pytest.approx(1)
    for wrong in ([1.0], [1.0, -1.0], [float("nan"), 1.0]):
        with pytest.raises(ConfigError):
            mean_weights(2, wrong)
    with pytest.raises(ConfigError, match="decay"):
        ema_weights(2, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "give two or more"),
        (["A", "NARROW"], "shape"),
        (["A", "A", "--weights", "1,x"], "must be numbers"),
        (["A", "A", "--weights", "1,2,3"], "one for each"),
        (["A", "A", "--ema", "2"], "decay"),
        (["A", "A", "--ema", "0.5", "--weights", "1,1"], "give one of them"),
        (["A", "NONE"], "no such file"),
    ],
)
def test_averages_that_make_no_sense(hf: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"A": str(hf), "NONE": str(tmp_path / "none")}
    if "NARROW" in arguments:
        places["NARROW"] = str(make_llama(tmp_path / "narrow", hidden=8, heads=2, kv_heads=1, mlp=24))
    found = _run("average", *[places.get(one, one) for one in arguments], "-o", tmp_path / "mean")
    assert found.exit_code == 2 and message in found.output
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".mean*"))


def test_the_scripts_in_tools(
    hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = Path(__file__).parents[2] / "tools"
    for name, words, said in (
        ("diff_checkpoints.py", [hf, hf], "equal"),
        ("inspect_checkpoint.py", [hf], "Hugging Face folder"),
        ("average_checkpoints.py", ["--help"], "--ema"),
    ):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(tools / name), run_name="__main__")
        assert ended.value.code == 0 and said in capsys.readouterr().out
        assert os.access(tools / name, os.X_OK)
