"""Every file in configs/ loads under the schema, and says what it needs and how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatune.config import config_as_dict, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
# What the parts leave to the recipe or to the user.
REQUIRED = ["model.path=m", "data.train=t.jsonl", "checkpoint.folder=runs/x"]


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def test_there_is_no_file_that_these_tests_miss() -> None:
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_file()}
    tested = {
        f"{folder}/{name}.yaml" for folder in ("models", "methods", "recipes") for name in names(folder)
    }
    assert found == tested | {"quickstart.yaml"}


@pytest.mark.parametrize("name", names("models"))
def test_models(name: str) -> None:
    path = CONFIGS / f"models/{name}.yaml"
    config = config_as_dict(load_config(path, REQUIRED[1:]))
    default = config_as_dict(load_config(path, REQUIRED))
    assert "/" in config["model"]["path"] and default["model"]["path"] == "m"
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", names("methods"))
def test_methods(name: str) -> None:
    assert load_config(CONFIGS / f"methods/{name}.yaml", REQUIRED).method.type == name


@pytest.mark.parametrize("name", names("recipes"))
def test_recipes(name: str) -> None:
    path = CONFIGS / f"recipes/{name}.yaml"
    config = load_config(path)
    model, method = name.rsplit("_", 1)
    assert config.method.type == method
    assert config.model.path == load_config(CONFIGS / f"models/{model}.yaml", REQUIRED[1:]).model.path
    assert config.checkpoint.folder == f"runs/{name}"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "Needs" in header[0] and "GPU" in header[0]
    assert any(f"configs/recipes/{name}.yaml" in line for line in header)
    for file in (*config.data.train, config.data.eval):
        assert any(str(file) in line for line in header), f"the header must say what {file} is"


def test_recipes_cover_the_promised_models() -> None:
    assert {"llama3_8b", "llama3_70b", "qwen3_8b", "mistral_7b", "gemma2_9b"} <= set(names("models"))
    for model in ("llama3_8b", "llama3_70b", "qwen3_8b", "mistral_7b", "gemma2_9b"):
        assert {f"{model}_full", f"{model}_lora"} <= set(names("recipes"))


def test_quickstart() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    assert config.method.type == "lora" and config.checkpoint.folder == "runs/quickstart"
    assert config.checkpoint.export == ["adapter", "merged"] and config.launch.cpu_nproc == 2
