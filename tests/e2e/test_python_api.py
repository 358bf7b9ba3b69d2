"""The public Python API, and the page that shows it."""

import re
from pathlib import Path

import torch

import megatune
from megatune.config.loader import dump_config
from tests.helpers.runs import LORA, tiny_config

DOCS = Path(__file__).parents[2] / "docs" / "python_api.md"


def test_every_block_of_the_page_runs(tiny_llama, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "unused")
    Path("run.yaml").write_text(dump_config(config))
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert names["logits"].shape == (1, 4, 320)
    assert names["result"].loss > 0
    assert capsys.readouterr().out.count("\n") >= 4


def test_copy_made_by_export_hf_gives_equal_logits(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = megatune.load_model(tiny_llama, dtype="fp32", device="cpu")
    folder = megatune.export_hf(model, tmp_path / "copy")
    tokens = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_adapter_folder_loads_with_its_base(tiny_llama, tiny_data, tmp_path):
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path, method=LORA))
    tokens = torch.randint(3, 300, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = megatune.load_model(tmp_path / "adapter", dtype="fp32", device="cpu")(tokens)
        merged = megatune.load_model(tmp_path / "merged", dtype="fp32", device="cpu")(tokens)
        base = megatune.load_model(tiny_llama, dtype="fp32", device="cpu")(tokens)
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    assert (adapted - base).abs().max() > 1e-3


def test_names_of_the_package():
    assert set(megatune.__all__) >= {
        "load_config",
        "train",
        "load_model",
        "export_hf",
        "TrainResult",
        "Config",
    }
    for name in megatune.__all__:
        assert getattr(megatune, name) is not None
