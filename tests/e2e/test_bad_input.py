"""A user's mistake: one sentence, exit code 2, no traceback, nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from megatune import cli
from megatune.config.loader import dump_config
from megatune.errors import ConfigError
from megatune.training.precision import compute_dtype
from tests.helpers.runs import losses, tiny_config
from tests.helpers.tiny import make_llama, tiny_rows


def train(config, tmp_path: Path, *overrides: str):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return CliRunner().invoke(cli.commands, ["train", str(path), *overrides])


def refused(result, *parts: str) -> str:
    """Assert one clear sentence on stderr that has all `parts`; returns it."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("megatune: ")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0], errors[0]
    return errors[0]


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_missing_model_folder(tiny_data, tmp_path):
    config = tiny_config(tmp_path / "nowhere", tiny_data, tmp_path / "run")
    refused(train(config, tmp_path), "nowhere")


def test_half_downloaded_model(tiny_data, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    (model / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({n: weights[n] for n in names[:5]}, model / "model-00001-of-00002.safetensors")
    refused(
        train(tiny_config(model, tiny_data, tmp_path / "run"), tmp_path), "model-00002-of-00002.safetensors"
    )


def test_unknown_architecture_names_the_supported_ones(tiny_data, model, tmp_path):
    settings = json.loads((model / "config.json").read_text())
    settings.update(model_type="mamba", architectures=["MambaForCausalLM"])
    (model / "config.json").write_text(json.dumps(settings))
    refused(
        train(tiny_config(model, tiny_data, tmp_path / "run"), tmp_path), "mamba", "llama", "qwen3", "gemma2"
    )


def test_truncated_safetensors(tiny_data, model, tmp_path):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(train(tiny_config(model, tiny_data, tmp_path / "run"), tmp_path), "model.safetensors")


def test_bad_json_line_and_skipping_it(tiny_data, tiny_llama, tmp_path):
    rows = tiny_data[0].read_text().splitlines()
    rows[6] = rows[6][:-5]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(rows))
    config = tiny_config(tiny_llama, (bad, tiny_data[1]), tmp_path / "run")
    refused(train(config, tmp_path), "bad.jsonl:7")
    skipping = train(config, tmp_path, "data.on_error=skip", f"checkpoint.folder={tmp_path / 'run2'}")
    assert skipping.exit_code == 0, skipping.output
    assert "1 left out (json)" in skipping.output


def test_row_without_an_assistant_turn(tiny_llama, tiny_data, tmp_path):
    rows = [*tiny_rows(3), {"messages": [{"role": "user", "content": "Hello?"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(
        train(tiny_config(tiny_llama, (path, tiny_data[1]), tmp_path / "run"), tmp_path),
        "rows.jsonl:4",
        "assistant",
    )


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_sample_longer_than_the_limit(policy, tiny_llama, tiny_data, tmp_path):
    long = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "The owl sings. " * 60},
        ]
    }
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*tiny_rows(20), long]))
    config = tiny_config(tiny_llama, (path, tiny_data[1]), tmp_path / "run", train__steps=1)
    config.data.too_long = policy
    result = train(config, tmp_path)
    if policy == "error":
        refused(result, "long.jsonl:21", "96")
    else:
        assert result.exit_code == 0, result.output
        assert {"truncate": "truncated", "drop": "dropped"}[policy] in result.output


def test_empty_data_set(tiny_llama, tiny_data, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    refused(train(tiny_config(tiny_llama, (path, tiny_data[1]), tmp_path / "run"), tmp_path), "empty.jsonl")


def test_missing_data_file(tiny_llama, tiny_data, tmp_path):
    config = tiny_config(tiny_llama, (tmp_path / "none.jsonl", tiny_data[1]), tmp_path / "run")
    refused(train(config, tmp_path), "data.train", "none.jsonl")


def test_template_that_raises(tiny_llama, tiny_data, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run")
    config.data.chat_template = str(template)
    refused(train(config, tmp_path), "train.jsonl:1", "roles must alternate")


def test_template_cannot_reach_python(tiny_llama, tiny_data, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run")
    config.data.chat_template = str(template)
    refused(train(config, tmp_path), "train.jsonl:1")


def test_wrong_dtype_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"model\.dtype: bf16 needs.*Tesla V100 has 7\.0.*fp32"):
        compute_dtype("bf16", gpu)
    assert compute_dtype("auto", gpu) == torch.float32


def test_more_processes_than_sequences(tiny_llama, tiny_data, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(2)))
    config = tiny_config(tiny_llama, (path, tiny_data[1]), tmp_path / "run", data__packing=False)
    config.launch.nproc = 4
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, "-m", "megatune", "train", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "2 packed sequences are fewer than the 4 data-parallel processes" in done.stderr
    assert done.stderr.count("megatune: ") == 1


def test_batch_that_does_not_split(tiny_llama, tiny_data, tmp_path):
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run")
    refused(
        train(config, tmp_path, "--nproc", "3"),
        "train.global_batch_size",
        "3 data parallel processes",
        "use 3, 6",
    )


def test_output_folder_of_another_run(tiny_llama, tiny_data, tmp_path):
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run", train__steps=1)
    assert train(config, tmp_path).exit_code == 0
    before = losses(tmp_path / "run")
    refused(train(config, tmp_path, "train.seed=8"), "another run", "train.seed: 7 there, 8 here")
    assert losses(tmp_path / "run") == before


def test_disk_too_small(tiny_llama, tiny_data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    result = train(tiny_config(tiny_llama, tiny_data, tmp_path / "run"), tmp_path)
    refused(result, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run")


def test_nan_loss_names_step_sequences_and_checkpoint(tiny_data, tmp_path):
    model = make_llama(tmp_path / "model")
    config = tiny_config(model, tiny_data, tmp_path / "run", train__steps=6, optim__warmup=0)
    config.checkpoint.every = 1
    config.optim.lr = 1e30
    config.optim.schedule = "constant"
    message = refused(train(config, tmp_path), "not finite", "sequences", "step-00000")
    assert "step 2" in message or "step 3" in message


def test_nan_before_any_checkpoint(tiny_data, tmp_path):
    model = make_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(model, tiny_data, tmp_path / "run")
    refused(train(config, tmp_path), "step 1", "not finite", "no checkpoint")


def test_unknown_key_suggests_the_nearest(tiny_llama, tiny_data, tmp_path):
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run")
    refused(train(config, tmp_path, "optim.learning_rat=1"), "optim.learning_rat", "optim.lr")
