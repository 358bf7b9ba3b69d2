"""`model.fp8`: which layers compute in fp8, how far a run's losses then go from those without, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megatune
from megatune import checkpoint, models, ops
from megatune.errors import ConfigError
from megatune.ops import Fp8Recipe, Segments, Targets
from megatune.parallel.tensor import Linear
from megatune.training.layout import check
from megatune.training.precision import check_fp8
from tests.helpers.ops import relative_error
from tests.helpers.runs import LORA, losses, tiny_config


def test_losses_stay_close_to_those_in_fp32(tiny_llama, tiny_data, tmp_path, monkeypatch) -> None:
    calls = []
    product = ops.OPS["fp8_mm"].bodies["reference"].run[0]
    spy = replace(
        ops.OPS["fp8_mm"].bodies["reference"], run=(lambda *args: calls.append(1) or product(*args),)
    )
    monkeypatch.setitem(ops.OPS["fp8_mm"].bodies, "reference", spy)
    curves = {}
    for fp8 in (None, "rowwise"):
        folder = tmp_path / str(fp8)
        changes = {"model__fp8": fp8, "data__eval": None, "train__steps": 8, "checkpoint__export": []}
        megatune.train(tiny_config(tiny_llama, tiny_data, folder, **changes))
        curves[fp8] = torch.tensor(losses(folder))
    # Two layers of four linear layers: forward, gradients of input and weight; the same batches, four a step.
    assert len(calls) == 8 * 4 * 2 * 4 * 3
    assert curves[None][-1] < curves[None][0] - 0.5
    difference = (curves["rowwise"] - curves[None]).abs()
    assert 0 < difference.max() < 0.03


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_norms_taken_along_change_nothing(recompute: str, tiny_llama) -> None:
    # The tiny model is too narrow for blocks, which are what norms are taken along with.
    spec = checkpoint.resolve_model(str(tiny_llama)).spec
    model = models.build(spec)
    models.use_fp8(model, "blockwise")
    assert all(layer.joined for layer in model.layers.values())
    models.materialise_random(model, 3, "cpu")
    models.use_fp8(model, "rowwise")
    assert not any(layer.joined for layer in model.layers.values())
    model.recompute = recompute
    tokens = torch.randint(0, spec.vocab_size, (40,))
    segments, targets = Segments.from_lengths([25, 15]), Targets(torch.arange(39), tokens[1:])
    results = []
    for joined in (True, False):
        for layer in model.layers.values():
            layer.joined = joined
        loss = model(tokens, segments, targets)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    # A norm's last bit may move a number over the border between two codes.
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 5e-3


@pytest.mark.gpu
def test_losses_on_a_gpu_stay_close_to_those_in_bf16(tiny_llama, tiny_data, tmp_path) -> None:
    if "rowwise" not in ops.fp8_products():
        pytest.skip("this GPU has no fp8 products")
    curves = []
    for fp8 in (None, "rowwise"):
        folder = tmp_path / str(fp8)
        changes = {"model__fp8": fp8, "model__dtype": "bf16", "data__eval": None, "checkpoint__export": []}
        megatune.train(
            tiny_config(tiny_llama, tiny_data, folder, train__steps=8, parallel={"zero": 1}, **changes)
        )
        curves.append(torch.tensor(losses(folder)))
    assert curves[0][-1] < curves[0][0] - 0.5
    assert 0 < (curves[1] - curves[0]).abs().max() < 0.05


def test_head_and_embeddings_stay_as_they_are(tiny_llama) -> None:
    spec = checkpoint.resolve_model(str(tiny_llama)).spec
    model = models.build(spec)
    models.use_fp8(model, "blockwise")
    names = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.fp8}
    parts = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
    assert names == {f"layers.{layer}.{part}" for layer in range(2) for part in parts}
    assert model.layers["0"].mlp.down.fp8 == Fp8Recipe("blockwise")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": LORA}, "model.fp8: rowwise is for method full; leave it out with method.type: lora"),
        ({"parallel__tensor": 2}, "does not go with parallel.tensor: 2; set that to 1"),
        ({"parallel__offload": True}, "not proven with parallel.offload"),
        ({"train__compile": True}, "not proven with train.compile"),
        (
            {"parallel": {"pipeline": 2, "schedule": "zb-h1", "zero": 1}},
            "does not go with parallel.schedule: zb-h1; use 1f1b",
        ),
        (
            {"model__fp8": "blockwise"},
            "sizes that are multiples of 128, and this model's hidden size is 64; use rowwise",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, message, tiny_llama, tiny_data, tmp_path) -> None:
    if "model__fp8" not in changes:
        changes = changes | {"model__fp8": "rowwise"}
    config = tiny_config(tiny_llama, tiny_data, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        check(
            config,
            checkpoint.resolve_model(str(tiny_llama)).spec,
            config.parallel.tensor * config.parallel.pipeline,
        )


def test_a_gpu_without_such_products_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for known, scaling, message in (
        ((), "rowwise", "rowwise needs a GPU of compute capability 8.9 or newer; A100 has 8.0: leave it out"),
        (("rowwise",), "blockwise", "blockwise needs a GPU of compute capability 9.0; .*: use rowwise"),
    ):
        monkeypatch.setattr(ops, "fp8_products", lambda known=known: known)
        with pytest.raises(ConfigError, match=message):
            check_fp8(scaling, torch.device("cuda"))
        check_fp8(None, torch.device("cuda"))
    check_fp8("blockwise", torch.device("cpu"))
