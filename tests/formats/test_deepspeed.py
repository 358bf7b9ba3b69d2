"""DeepSpeed's checkpoints against the tensors that went into them, bit for bit.

Most files here are made by `tests/helpers/deepspeed_files.py`. The real thing (`-m slow`, with deepspeed installed):
processes train under ZeRO 0 to 3, and what is read is compared with DeepSpeed's `zero_to_fp32`, with its universal
conversion and with the values that its engine had in memory. Done with deepspeed 0.19.8 on 2 and 3 processes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatune.checkpoint.convert import core, formats
from megatune.checkpoint.convert.base import Opened, Options
from megatune.checkpoint.convert.names import whole_model
from megatune.errors import CheckpointError
from tests.helpers.deepspeed_files import Case, States, edit, write, write_universal
from tests.helpers.tiny import make_llama

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
MLP = frozenset(
    f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(2) for part in ("gate", "up", "down")
)

CASES = {
    "stage 0": Case(0),
    "stage 1": Case(1),
    "stage 1, fp16, 3 ranks": Case(1, 3, torch.float16),
    "stage 1, frozen": Case(1, frozen=MLP),
    "stage 1, BF16_Optimizer, 5 ranks": Case(1, 5, bf16_optimizer=True),
    "stage 2": Case(2),
    "stage 2, one rank": Case(2, 1),
    "stage 2, 7 ranks, shuffled": Case(2, 7, reverse=True),
    "stage 2, elastic, 3 ranks": Case(2, 3, elastic=True),
    "stage 2, aligned, 3 ranks": Case(2, 3, align=8),
    "stage 2, fp32": Case(2, dtype=torch.float32),
    "stage 2, frozen, tied": Case(2, 3, frozen=MLP, tied={HEAD: EMBED}),
    "stage 3": Case(3),
    "stage 3, 5 ranks, sub-groups": Case(3, 5, sub_group=500),
    "stage 3, frozen, tied, 3 ranks": Case(3, 3, frozen=MLP, tied={HEAD: EMBED}),
    "stage 3, 40 ranks": Case(3, 40),  # more than a norm has elements
}


Model = tuple[Path, States]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Model]:
    """By whether embedding and head are tied: a Hugging Face folder, and what its training has of each weight."""
    return {tied: _make_model(tmp_path_factory.mktemp("hf"), tied) for tied in (False, True)}


def _make_model(folder: Path, tied: bool) -> Model:
    make_llama(folder, hidden=12, heads=2, kv_heads=1, mlp=23, vocab_size=303, tied=tied)
    masters = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    moments = {
        slot: {name: torch.randn(one.shape, generator=generator) for name, one in masters.items()}
        for slot in ("exp_avg", "exp_avg_sq")
    }
    return folder, {"master": masters, **moments}


@pytest.fixture
def untied(models: dict[bool, Model]) -> Model:
    return models[False]


def _open(path: Path, like: Path | None, **options: Any) -> Opened:
    found = formats.find(path)
    assert found.name == "deepspeed"
    return whole_model(found.open(path, Options(like=str(like) if like else None, **options)))


def _whole(source: Any, name: str) -> Tensor:
    return source.rows(name, 0, source.shape(name)[0])


def _check(opened: Opened, exact: Opened, states: States, case: Case) -> None:
    """Weights in the dtype of training and (`exact`) in fp32, and all states."""
    for name, master in states["master"].items():
        trained = master.to(case.dtype)
        assert torch.equal(_whole(opened.weights, name), trained), name
        assert opened.weights.dtype(name) == case.dtype
        whole = name not in case.frozen and case.stage > 0
        assert torch.equal(_whole(exact.weights, name).float(), master if whole else trained.float()), name
    trained_names = states["master"].keys() - case.frozen
    for slot, found in states.items() if case.stage else ():
        assert opened.optimizer[slot].names() == trained_names
        for name in trained_names:
            assert torch.equal(_whole(opened.optimizer[slot], name), found[name]), (slot, name)
    assert opened.step == 7


@pytest.mark.parametrize("name", CASES)
def test_zero(name: str, tmp_path: Path, models: dict[bool, Model]) -> None:
    case = CASES[name]
    like, states = models[bool(case.tied)]
    folder = write(tmp_path, states, case)
    for path in (tmp_path, folder):
        _check(_open(path, like), _open(path, like, dtype=torch.float32), states, case)
    source = _open(tmp_path, like).optimizer.get("master", _open(tmp_path, like).weights)
    expected = states["master"][EMBED].to(source.dtype(EMBED))
    for start, stop in ((0, 1), (100, 203), (302, 303), (5, 5)):  # across partitions
        assert torch.equal(source.rows(EMBED, start, stop), expected[start:stop])


UNIVERSAL = [
    "stage 1",
    "stage 2, 7 ranks, shuffled",
    "stage 2, frozen, tied",
    "stage 3",
    "stage 3, 5 ranks, sub-groups",
    "stage 3, frozen, tied, 3 ranks",
]


@pytest.mark.parametrize("name", UNIVERSAL)
def test_universal(name: str, tmp_path: Path, models: dict[bool, Model]) -> None:
    case = CASES[name]
    like, states = models[bool(case.tied)]
    folder = write_universal(tmp_path, states, case)
    for path in (tmp_path, folder):
        _check(_open(path, like), _open(path, like, dtype=torch.float32), states, case)


def test_to_a_hugging_face_folder(tmp_path: Path, untied: Model) -> None:
    like, states = untied
    write(tmp_path / "ds", states, CASES["stage 2"])
    core.convert(tmp_path / "ds", tmp_path / "hf", "hf", Options(like=str(like)), verify=True)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == states["master"].keys()
    assert all(torch.equal(found[name], one.bfloat16()) for name, one in states["master"].items())
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.model.", "model."])
def test_wrappers_prefixes_go(prefix: str, tmp_path: Path, untied: Model) -> None:
    like, states = untied
    wrapped = {slot: {prefix + name: one for name, one in found.items()} for slot, found in states.items()}
    write(tmp_path, wrapped, CASES["stage 3"])
    _check(_open(tmp_path, like), _open(tmp_path, like, dtype=torch.float32), states, CASES["stage 3"])


def test_which_step(tmp_path: Path, untied: Model) -> None:
    like, states = untied
    for step in (5, 100, 20):
        write(tmp_path, states, CASES["stage 1"], step)
    assert _open(tmp_path, like).step == 20  # what `latest` says
    assert _open(tmp_path, like, step=5).step == 5
    (tmp_path / "latest").unlink()
    assert _open(tmp_path, like).step == 100
    with pytest.raises(CheckpointError, match="no global_step6; there are steps 5, 20, 100"):
        _open(tmp_path, like, step=6)


def test_config_beside_the_checkpoint(tmp_path: Path, untied: Model) -> None:
    like, states = untied
    folder = write(tmp_path, states, CASES["stage 1"])
    with pytest.raises(CheckpointError, match="--like"):
        _open(tmp_path, None)
    (tmp_path / "config.json").write_bytes((like / "config.json").read_bytes())
    assert _open(folder, None).weights.names() == states["master"].keys()


def _optimizer_file(folder: Path, rank: int = 1) -> Path:
    return folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _peft(folder: Path) -> None:
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 12)}
    edit(folder / "mp_rank_00_model_states.pt", lambda found: found["module"].update(lora))


def _old(folder: Path) -> None:
    """As before 0.19.8: nothing said of paddings between parameters."""
    for rank in range(2):
        edit(
            _optimizer_file(folder, rank),
            lambda one: one["optimizer_state_dict"].pop("param_alignment_paddings"),
        )


def _shapes(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    _old(folder)
    edit(folder / "mp_rank_00_model_states.pt", lambda found: change(found["param_shapes"]))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an optimizer file is missing": (
        lambda f: _optimizer_file(f).unlink(),
        "saved by 2 ranks, and 1 optimizer files",
    ),
    "the first one is missing": (lambda f: _optimizer_file(f, 0).unlink(), "has no file of rank 0"),
    "of another run": (
        lambda f: edit(
            _optimizer_file(f),
            lambda found: found["optimizer_state_dict"].update(
                single_partition_of_fp32_groups=[torch.ones(9)] * 2
            ),
        ),
        "less than the .* values",
    ),
    "a parameter more": (
        lambda f: _shapes(f, lambda groups: groups[1].update(x=torch.Size([999]))),
        "less than the 999 values of master of x",
    ),
    "a parameter less": (lambda f: _shapes(f, lambda groups: groups[0].pop(EMBED)), "do not belong together"),
    "paddings of other parameters": (
        lambda f: edit(f / "mp_rank_00_model_states.pt", lambda found: found["param_shapes"][0].pop(EMBED)),
        "param_alignment_paddings do not fit",
    ),
    "tensor parallel": (
        lambda f: (f / "mp_rank_01_model_states.pt").write_bytes(b""),
        "several tensor- or pipeline-parallel ranks.*ds_to_universal",
    ),
    "a pipeline": (lambda f: (f / "layer_00-model_00-model_states.pt").write_bytes(b""), "pipeline"),
    "cut off": (lambda f: os.truncate(_optimizer_file(f), 2000), "cut off"),
    "latest leaves the folder": (lambda f: (f.parent / "latest").write_text("../x"), "is no folder in it"),
    "latest names nothing": (
        lambda f: (f.parent / "latest").write_text("global_step9"),
        "no whole checkpoint",
    ),
    "adapters": (_peft, "PEFT adapters"),
    "no shapes": (
        lambda f: edit(f / "mp_rank_00_model_states.pt", lambda found: found.pop("param_shapes")),
        "has no param_shapes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_whole_is_named(name: str, tmp_path: Path, untied: Model) -> None:
    like, states = untied
    folder = write(tmp_path, states, CASES["stage 2"])
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path, like)


def test_universal_files_with_shuffled_parameters_are_refused(tmp_path: Path, untied: Model) -> None:
    """DeepSpeed's own conversion gives wrong tensors there: seen with 0.19.8, by the test with the real thing."""
    like, states = untied
    folder = write_universal(tmp_path, states, CASES["stage 2"])
    change = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    edit(folder / "mp_rank_00_model_states.pt", lambda found: found.update(ds_config=change))
    with pytest.raises(CheckpointError, match="round_robin_gradients"):
        _open(tmp_path, like)


def test_another_optimizer_is_said(tmp_path: Path, untied: Model) -> None:
    like, states = untied
    case = dataclasses.replace(CASES["stage 1"])
    write(tmp_path, {"master": states["master"], "exp_avg": states["exp_avg"]}, case)
    opened = _open(tmp_path, like)
    assert opened.optimizer.keys() == {"master", "exp_avg"}
    assert any(line.what == "skipped" and "exp_avg_sq" in line.tensor for line in opened.report)


# The real thing.


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("ranks", [2, 3])
def test_files_of_deepspeed_itself(ranks: int, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "helpers" / "deepspeed_train.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    subprocess.run([*command, str(script), str(tmp_path)], check=True, env=environment, timeout=1200)
    cases = sorted(folder for folder in tmp_path.iterdir() if (folder / "truth.pt").is_file())
    assert len(cases) >= 10
    for folder in cases:
        _compare_with_deepspeed(folder)


def _compare_with_deepspeed(folder: Path) -> None:
    truth = torch.load(folder / "truth.pt", weights_only=True)
    opened, exact = _open(folder, folder / "hf"), _open(folder, folder / "hf", dtype=torch.float32)
    assert opened.step == truth["step"]
    for name in opened.weights.names():
        assert torch.equal(_whole(opened.weights, name), truth["module"][name]), (folder.name, name)
    for name, value in truth["consolidated"].items():
        if name in exact.weights.names():
            assert torch.equal(_whole(exact.weights, name).float(), value.float()), (folder.name, name)
    for slot, found in truth["states"].items():
        assert opened.optimizer[slot].names() == found.keys(), (folder.name, slot)
        for name, value in found.items():
            assert torch.equal(_whole(opened.optimizer[slot], name), value), (folder.name, slot, name)
    if (folder / "universal").is_dir():
        universal = _open(folder / "universal", folder / "hf")
        for slot, source in universal.optimizer.items():
            assert source.names() == opened.optimizer[slot].names()
            for name in source.names():
                assert torch.equal(_whole(source, name), _whole(opened.optimizer[slot], name)), (
                    folder.name,
                    name,
                )
        for name in universal.weights.names():
            assert torch.equal(_whole(universal.weights, name), truth["module"][name]), (folder.name, name)
