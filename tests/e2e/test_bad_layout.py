"""A layout that cannot be: one sentence with the number to change, exit code 2, before any process starts."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatune import cli
from megatune.config.loader import dump_config
from tests.helpers.runs import LORA, tiny_config

# What is asked for -> parts of the sentence. The tiny model: 2 layers, 4 heads, 2 KV heads, inner size 128.
WRONG = {
    "processes do not factor": (
        ("parallel.tensor=2", "launch.nproc=3"),
        ("tensor 2", "3 processes", "2 or 4"),
    ),
    "replicas": (("parallel.replicate=3", "launch.nproc=4"), ("parallel.replicate: 3", "1, 2, 4")),
    "experts of a dense model": (("parallel.expert=2", "launch.nproc=2"), ("parallel.expert", "no experts")),
    "expert size": (("parallel.expert=4", "launch.nproc=2"), ("parallel.expert: 4", "1, 2")),
    "expert_tensor": (
        ("parallel.tensor=4", "parallel.expert_tensor=3", "launch.nproc=4"),
        ("parallel.expert_tensor: 3", "1, 2, 4"),
    ),
    "heads": (("parallel.tensor=3", "launch.nproc=3"), ("parallel.tensor: 3", "4")),
    "ulysses heads": (
        ("parallel.context=3", "parallel.context_method=ulysses", "launch.nproc=3"),
        ("parallel.context", "4"),
    ),
    "more stages than layers": (("parallel.pipeline=8", "launch.nproc=8"), ("parallel.pipeline", "2 layers")),
    "stages do not add up": (
        ("parallel.pipeline=2", "parallel.stages=[1,2]", "launch.nproc=2"),
        ("parallel.stages", "2"),
    ),
    "wrong number of stages": (
        ("parallel.pipeline=2", "parallel.stages=[2]", "launch.nproc=2"),
        ("parallel.stages", "2"),
    ),
    "too few micro-batches": (
        (
            "parallel.pipeline=2",
            "parallel.schedule=interleaved",
            "parallel.stages=[1,0,1,0]",
            "train.global_batch_size=3",
            "launch.nproc=2",
        ),
        ("train.global_batch_size", "4"),
    ),
    "batch does not split": (
        ("train.global_batch_size=3", "launch.nproc=2"),
        ("train.global_batch_size: 3", "2, 4"),
    ),
    "zero-bubble and ZeRO 3": (
        ("parallel.pipeline=2", "parallel.schedule=zb-h1", "parallel.zero=3", "launch.nproc=2"),
        ("zb-h1", "parallel.zero"),
    ),
    "offloaded optimizer and ZeRO 3": (
        ("parallel.offload_optimizer=true", "parallel.zero=3"),
        ("parallel.offload_optimizer", "parallel.zero to 1 or 2"),
    ),
    "offloaded optimizer and Muon": (
        ("parallel.offload_optimizer=true", "parallel.zero=2", "optim.name=muon"),
        ("parallel.offload_optimizer", "optim.name: adamw"),
    ),
    "bf16 weights of a run in fp32": (("optim.name=adamw_bf16",), ("model.dtype: bf16", "optim.name: adamw")),
    "bf16 weights and adapters": (
        ("optim.name=adamw_bf16", "model.dtype=bf16"),
        ("optim.name: adamw_bf16", "adapters", "use adamw"),
    ),
    "bf16 weights in host memory": (
        ("optim.name=adamw_bf16", "model.dtype=bf16", "parallel.offload_optimizer=true", "parallel.zero=2"),
        ("parallel.offload_optimizer", "optim.name: adamw"),
    ),
    "schedule without pipeline": (("parallel.schedule=gpipe",), ("parallel.schedule", "parallel.pipeline")),
    "virtual without pipeline": (("parallel.virtual=2",), ("parallel.virtual",)),
    "stages without pipeline": (("parallel.stages=[2]",), ("parallel.stages",)),
    "ulysses without context": (("parallel.context_method=ulysses",), ("parallel.context_method",)),
    "replicas of what is whole": (
        ("parallel.replicate=2", "parallel.zero=0", "launch.nproc=2"),
        ("parallel.replicate: 2", "parallel.zero"),
    ),
    "recompute above the layers": (("parallel.recompute=3",), ("parallel.recompute: 3", "2")),
    "expert_tensor without tensor": (("parallel.expert_tensor=1",), ("parallel.expert_tensor",)),
    "compiled layers under a layout": (
        ("parallel.tensor=2", "train.compile=true", "launch.nproc=2"),
        ("train.compile", "parallel.tensor: 2"),
    ),
    "balancing of a dense model": (("moe.aux_loss=0.01",), ("moe.aux_loss", "experts")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused_before_any_process_starts(
    wrong: str, tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    def started(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr("megatune.launch.local.run_local", started)
    monkeypatch.setattr("megatune.training.train", started, raising=False)
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run", method=LORA, parallel={"zero": 1})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    overrides, parts = WRONG[wrong]
    result = CliRunner().invoke(cli.commands, ["train", str(path), *overrides])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("megatune: ")]
    for part in parts:
        assert part in error, error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_experts_that_do_not_divide(tiny_llama: Path, tiny_data, tmp_path: Path) -> None:
    from tests.helpers.parity import FAMILIES

    settings = FAMILIES["moe"] | {"num_experts": 6}
    folder = tmp_path / "moe"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    config = tiny_config(folder, tiny_data, tmp_path / "run", parallel={"expert": 4})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    result = CliRunner().invoke(cli.commands, ["train", str(path), "launch.nproc=4"])
    assert result.exit_code == 2, (result.output, result.exception)
    assert (
        "parallel.expert: 4" in result.stderr
        and "6 experts" in result.stderr
        and "1, 2, 3, 6" in result.stderr
    )


@pytest.mark.parametrize(
    "override", ["parallel.tensor=true", "parallel.recompute=true", "parallel.zero=false"]
)
def test_a_truth_value_is_no_number(override: str, tiny_llama: Path, tiny_data, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(tiny_llama, tiny_data, tmp_path / "run")))
    result = CliRunner().invoke(cli.commands, ["train", str(path), override])
    assert result.exit_code == 2, (result.output, result.exception)
    assert override.partition("=")[0] in result.stderr and "true or false" in result.stderr
