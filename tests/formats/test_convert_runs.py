"""Runs of megatune, their adapters and optimizer states, through the converters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megatune
from megatune.checkpoint import resolve_model
from megatune.checkpoint.convert import hf
from megatune.checkpoint.convert.base import Options
from megatune.checkpoint.convert.core import convert
from megatune.checkpoint.convert.formats import find
from megatune.checkpoint.manifest import MANIFEST, RUN, BlockChecksums, dump_manifest, read_manifest
from megatune.errors import CheckpointError
from tests.formats.test_gguf import CASES, Type, make_hf, write_gguf
from tests.helpers.runs import LORA, losses, tensors, tiny_config
from tests.helpers.tiny import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def runs(
    tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A full and a LoRA run of 4 steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method in (("full", {"type": "full"}), ("lora", LORA)):
        megatune.train(tiny_config(tiny_llama, tiny_data, folder / name, method=method, checkpoint__every=2))
    return {name: folder / name for name in ("full", "lora")}


def equal(first: Path, second: Path) -> bool:
    before, after = tensors(first), tensors(second)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_becomes_its_own_export(runs: dict[str, Path], tmp_path: Path) -> None:
    result = convert(runs["full"], tmp_path / "out", "hf", verify=True)
    assert (result.kind, result.step) == ("megatune", 4)
    assert equal(tmp_path / "out", runs["full"] / "model")
    assert {line.tensor for line in result.report if line.what == "skipped"} == {
        f"{slot} of all weights" for slot in ("master", "exp_avg", "exp_avg_sq")
    }
    convert(runs["full"], tmp_path / "two", "hf", Options(step=2))
    convert(runs["full"] / "checkpoints/step-000002", tmp_path / "step", "hf")
    assert equal(tmp_path / "two", tmp_path / "step") and not equal(tmp_path / "two", tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3"):
        convert(runs["full"], tmp_path / "three", "hf", Options(step=3))


def test_optimizer_states_go_along_and_a_run_goes_on_with_them(
    runs: dict[str, Path], tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    result = convert(runs["full"], tmp_path / "ours", "megatune", Options(step=2), verify=True)
    assert result.tensors == 4 * 21  # weights, masters and both moments
    notes = json.loads((tmp_path / "ours/megatune-digests.json").read_text())["tensors"]
    assert notes.keys() == {"weights", "master", "exp_avg", "exp_avg_sq"}
    again = convert(tmp_path / "ours", tmp_path / "again", "megatune", verify=True)
    assert (again.kind, again.step) == ("megatune", 2)
    assert json.loads((tmp_path / "again/megatune-digests.json").read_text())["tensors"] == notes
    # By way of Megatron's ranks, weights rounded to bf16: masters and moments are the same.
    options = Options(tensor=2, vocab_multiple=8, dtype=torch.bfloat16)
    convert(tmp_path / "ours", tmp_path / "legacy", "megatron", options, verify=True, workers=1)
    convert(tmp_path / "legacy", tmp_path / "through", "megatune", verify=True, workers=1)
    through = json.loads((tmp_path / "through/megatune-digests.json").read_text())["tensors"]
    assert all(through[slot] == notes[slot] for slot in ("master", "exp_avg", "exp_avg_sq"))
    config = tiny_config(
        tmp_path / "ours", tiny_data, tmp_path / "run", checkpoint__start=str(tmp_path / "again")
    )
    megatune.train(config)
    assert equal(tmp_path / "run/model", runs["full"] / "model")
    after = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in after if "loss" in row] == losses(runs["full"])[2:]
    without = convert(runs["full"], tmp_path / "small", "megatune", Options(optimizer=False), verify=True)
    assert without.tensors == 21
    wrong = tiny_config(tiny_llama, tiny_data, tmp_path / "no", checkpoint__start=str(tmp_path / "small"))
    with pytest.raises(CheckpointError, match="lacks optim/exp_avg"):
        megatune.train(wrong)


def test_an_adapter_is_merged_or_written_as_it_is(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    merged = convert(runs["lora"], tmp_path / "merged", "hf", verify=True)
    said = {
        line.tensor: line.detail for line in merged.report if line.detail.startswith("merged with lora of")
    }
    assert (
        len(said) == 14
        and "lora of model.layers.0.self_attn.q_proj" in said["model.layers.0.self_attn.q_proj.weight"]
    )
    expected, found = (tensors(folder) for folder in (runs["lora"] / "merged", tmp_path / "merged"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    adapter = convert(runs["lora"], tmp_path / "adapter", "peft", verify=True)
    for result in (merged, adapter):
        (line,) = (line for line in result.report if line.tensor == "optimizer states")
        assert (line.what, line.detail) == (
            "skipped",
            "are of the adapters, for which no other format has a place",
        )
    assert adapter.tensors == 28 and equal(tmp_path / "adapter", runs["lora"] / "adapter")
    written, own = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "adapter", runs["lora"] / "adapter")
    )
    assert written == own
    # Three ways to the same merged model: the folder itself, the base with it, and another base by name.
    assert find(tmp_path / "adapter").name == "peft"
    convert(tmp_path / "adapter", tmp_path / "one", "hf", verify=True)
    convert(tiny_llama, tmp_path / "two", "hf", Options(adapter=str(tmp_path / "adapter")), verify=True)
    convert(tmp_path / "adapter", tmp_path / "three", "megatune", Options(like=str(tiny_llama)), verify=True)
    convert(tmp_path / "three", tmp_path / "four", "hf")
    assert all(equal(tmp_path / name, tmp_path / "merged") for name in ("one", "two", "four"))


@pytest.mark.parametrize("optimizer", ["lion", "adamw_8bit", "muon"])
def test_states_that_are_not_adamws_stay_behind(
    optimizer: str, tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    """The weights convert; one line says why the states do not."""
    changes = {"optim__name": optimizer, "train__steps": 1, "parallel": {"zero": 1}}
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path / "run", **changes))
    for to in ("torch_dist", "megatron", "megatune"):
        result = convert(tmp_path / "run", tmp_path / to, to, workers=1)
        assert result.tensors == 21
        said = [line for line in result.report if line.tensor.startswith("optim")]
        assert [line.what for line in said] == ["skipped"] and f"are of {optimizer} (" in said[0].detail
    convert(tmp_path / "torch_dist", tmp_path / "back", "hf", workers=1)
    assert equal(tmp_path / "back", tmp_path / "run/model")


def test_bf16_weights_are_widened_where_masters_are_fp32(
    tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {
        "optim__name": "adamw_bf16",
        "model__dtype": "bf16",
        "train__steps": 1,
        "parallel": {"zero": 1},
    }
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path / "run", **changes))
    result = convert(tmp_path / "run", tmp_path / "out", "megatune", workers=1, verify=True)
    assert result.tensors == 4 * 21 and not [line for line in result.report if line.what == "skipped"]
    converted = tensors(next((tmp_path / "out/checkpoints").iterdir()))
    own = tensors(next((tmp_path / "run/checkpoints").iterdir()))
    assert own["model/embed.weight"].dtype == torch.bfloat16
    for name, tensor in own.items():
        assert converted[name].dtype == torch.float32 and torch.equal(converted[name], tensor.float()), name
    for source, to in (("run", "exact"), ("out", "back")):
        convert(tmp_path / source, tmp_path / to, "hf", workers=1)
        assert equal(tmp_path / to, tmp_path / "run/model")


def test_an_adapter_of_another_model_is_refused(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    wide = make_llama(tmp_path / "wide", mlp=144)
    short = make_llama(tmp_path / "short", layers=1)
    for base, text in ((wide, "the factors of .* belongs to another base"), (short, "have no place in")):
        with pytest.raises(CheckpointError, match=text):
            convert(base, tmp_path / "out", "hf", Options(adapter=str(runs["lora"] / "adapter")))
        assert not (tmp_path / "out").exists()


def _forge(step: Path, text: bytes) -> None:
    """Another run.json, with the right checksums."""
    manifest, checksums = read_manifest(step), BlockChecksums()
    checksums.add(text)
    (step / RUN).write_bytes(text)
    forged = replace(manifest, files={**manifest.files, RUN: checksums.entry()})
    (step / MANIFEST).write_bytes(dump_manifest(forged))


def test_a_damaged_or_foreign_run_is_refused(runs: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(runs["full"], tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.yaml: is no configuration of a run"):
        convert(tmp_path / "run", tmp_path / "out", "hf")
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'])}]\n" for n in range(12))
    for text in (
        laughs + "model: {path: *a11}\nmethod: {type: full}\n",
        "[" * 100_000,
        "model: {path: [1]}\nmethod: {}\n",
        "model: {path: !!python/object/apply:os.getcwd []}\nmethod: {}\n",
        f"model: {{path: {tiny_llama}}}\nmethod: {{type: lora, rank: many}}\n",
    ):
        (tmp_path / "run/config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml"):
            convert(tmp_path / "run", tmp_path / "out", "hf")
    shutil.copy(runs["full"] / "config.yaml", tmp_path / "run/config.yaml")
    step = tmp_path / "run/checkpoints/step-000004"
    whole = (step / MANIFEST).read_bytes(), (step / RUN).read_bytes()
    for text in ('{"extra": []}', '{"extra": {"converted": {"dtype": "x"}}}', "[" * 100_000):
        _forge(step, text.encode())
        with pytest.raises(CheckpointError, match=r"run\.json|cannot be read"):
            convert(tmp_path / "run", tmp_path / "out", "hf")
        (step / MANIFEST).write_bytes(whole[0])
        (step / RUN).write_bytes(whole[1])
    shard = next((tmp_path / "run/checkpoints/step-000004").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged between bytes"):
        convert(tmp_path / "run", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert load_file(runs["full"] / "model/model.safetensors")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gguf_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "PORTION_BYTES", 3_000)  # parts of heads
    make_tokenizer(tmp_path / "source")
    architecture, _, _ = CASES[name]
    write_gguf(tmp_path / "source/x.gguf", make_hf(name), architecture, {"blk.0.attn_q.weight": Type.Q8_0})
    convert(tmp_path / "source/x.gguf", tmp_path / "out", "hf", verify=True)
    expected = resolve_model(str(tmp_path / "source/x.gguf")).path
    assert equal(tmp_path / "out", expected)
    assert {one.name for one in expected.iterdir()} < {one.name for one in (tmp_path / "out").iterdir()}
    assert convert(tmp_path / "source/x.gguf", tmp_path / "ours", "megatune", verify=True).kind == "gguf"
