"""Compute dtype, and compiled layers: gradients equal the eager ones, on a torch that gets them right."""

import pytest
import torch

from megatune import adapters, models, ops
from megatune.config.schema import LoraMethod
from megatune.errors import ConfigError
from megatune.ops import Segments, Targets
from megatune.training.precision import can_compile, compile_layers, compute_dtype, peak_flops
from tests.helpers.families import pair

PLAIN = dict.fromkeys(("rms_norm", "add_rms_norm", "rope_qk", "glu", "attention"), "reference")


def test_compute_dtype_on_the_cpu(monkeypatch):
    cpu = torch.device("cpu")
    assert compute_dtype("fp32", cpu) == torch.float32
    assert compute_dtype("bf16", cpu) == torch.bfloat16
    for has_amx, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert compute_dtype("auto", cpu) == expected


def test_peak_of_known_devices(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("unheard of", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


def test_compiling_is_refused_where_torch_gets_it_wrong(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ConfigError, match=r"train\.compile: true needs torch 2\.13"):
        compile_layers(None)


@pytest.mark.skipif(not can_compile(), reason="torch 2.13")
@pytest.mark.parametrize("bodies", [{}, PLAIN], ids=["chosen", "plain"])
def test_compiled_layers_have_the_eager_gradients(bodies, monkeypatch):
    """`plain`: what is traced on a GPU, where the fused bodies are made of the same formulas."""
    plain_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain_compile(self, backend="aot_eager"))
    ops.configure(bodies, torch.device("cpu"))
    case = pair("llama")
    model = models.build(case.spec).to_empty(device="cpu")
    model.load_state_dict(case.ours.state_dict())
    adapters.attach(model, LoraMethod(type="lora", rank=4))
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    tokens, segments = torch.arange(12) + 3, Segments.from_lengths([7, 5])
    targets = Targets(torch.tensor([1, 4, 8]), torch.tensor([5, 6, 7]))

    def gradients():
        model.zero_grad()
        model(tokens, segments, targets).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    try:
        eager = gradients()
        compile_layers(model)
        compiled = gradients()
    finally:
        ops.configure({}, torch.device("cpu"))
        torch._dynamo.reset()
    assert eager.keys() == compiled.keys()
    for name, grad in eager.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(compiled[name], grad, rtol=1e-5, atol=1e-7)
