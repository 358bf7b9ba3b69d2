"""Published 4- and 8-bit weights are read as the numbers that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatune.checkpoint import export_hf, load_pretrained
from megatune.checkpoint.quantised import dequantised
from megatune.checkpoint.resolve import open_folder
from megatune.checkpoint.sources import SafetensorsFolder
from megatune.models import Decoder, build, from_hf_state, whole_weights
from tests.helpers.families import as_in_files, hf_config, hf_from_config, hf_model


def _folder(path: Path, tensors: dict[str, Tensor], config: dict, quantisation: dict) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return path


def _loaded(path: Path) -> tuple[Decoder, object]:
    folder = open_folder(path, str(path))
    model = build(folder.spec).to_empty(device="cpu")
    load_pretrained(whole_weights(model), folder.spec, folder)
    return model, folder


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """As transformers dequantises it, through loading and export; the bf16 folder says nothing of quantisation."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    settings = hf_config("gpt-oss")
    settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers = 64, 96, 2
    settings.layer_types = settings.layer_types[:2]
    state = {name: tensor.bfloat16() for name, tensor in hf_from_config(settings).state_dict().items()}
    expected, packed = dict(state), dict(state)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in state if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(110, 130, shape, dtype=torch.uint8, generator=generator)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
        assert len(expected[name].unique()) > 50
    path = _folder(tmp_path / "packed", packed, settings.to_dict(), {"quant_method": "mxfp4"})
    ours, folder = _loaded(path)
    wanted = from_hf_state(ours.spec, folder.family, expected)
    assert all(torch.equal(ours.state_dict()[name], value.float()) for name, value in wanted.items())
    export_hf(whole_weights(ours), ours, tmp_path / "out", source=folder, merge=False, dtype=torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_fp8_of_deepseek(tmp_path: Path) -> None:
    """Blocks of 16 x 16 that do not divide the shapes; some tensors stay as they are."""
    hf = hf_model("deepseek-v3")
    state = {name: tensor.bfloat16() for name, tensor in as_in_files(hf, hf.state_dict()).items()}
    expected, packed, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        expected[name] = packed[name] = tensor
        if tensor.dim() == 2 and "_proj" in name:
            rows, columns = (-(-size // 16) for size in tensor.shape)
            scales = torch.rand(rows, columns, generator=generator) + 0.1
            packed |= {name: (8 * tensor).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
            each = [[scales[i // 16, j // 16] for j in range(tensor.shape[1])] for i in range(len(tensor))]
            expected[name] = (packed[name].float() * torch.tensor(each)).bfloat16()
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    path = _folder(tmp_path / "packed", packed, hf.config.to_dict(), quantisation)
    ours, folder = _loaded(path)
    wanted = from_hf_state(ours.spec, folder.family, expected)
    assert all(torch.equal(ours.state_dict()[name], value.float()) for name, value in wanted.items())
    source = folder.tensors()
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (
        str(source) == str(path) and source.shape(name) == (56, 48) and source.dtype(name) == torch.bfloat16
    )
    assert torch.equal(source.rows(name, 17, 35), expected[name][17:35])


def test_layers_for_multi_token_prediction_in_a_file_are_passed_over(tmp_path: Path) -> None:
    hf = hf_model("deepseek-v3")
    state = as_in_files(hf, hf.state_dict())
    more = {
        "model.layers.3.eh_proj.weight": torch.zeros(3, 3),
        "model.layers.3.mlp.gate.weight": torch.zeros(2),
    }
    ours, folder = _loaded(_folder(tmp_path / "model", state | more, hf.config.to_dict(), {}))
    wanted = from_hf_state(ours.spec, folder.family, state)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in wanted.items())


def test_plain_files_are_read_as_they_are(tmp_path: Path) -> None:
    save_file({"x_scale_inv": torch.ones(2), "x": torch.ones(2)}, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    assert dequantised(source, {"quantization_config": None}) is source
