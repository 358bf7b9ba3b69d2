"""Megatron-Core's torch_dist: round trips bit for bit, the real megatron-core on either side, folders that lie."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatune.checkpoint.convert import dcp_files
from megatune.checkpoint.convert.base import Opened, Options
from megatune.checkpoint.convert.core import convert
from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.checkpoint.convert.dcp_metadata import METADATA
from megatune.checkpoint.convert.megatron_names import MegatronTable
from megatune.checkpoint.convert.names import whole_model
from megatune.checkpoint.convert.torch_dist import FORMAT
from megatune.checkpoint.convert.torch_dist_keys import written_slot
from megatune.checkpoint.hf import write_json
from megatune.checkpoint.sources import SafetensorsFolder
from megatune.errors import CheckpointError
from megatune.models import family_for
from tests.formats import mcore
from tests.formats.test_dcp import write
from tests.helpers.dist import run_ranks
from tests.helpers.families import hf_config, hf_model, pair
from tests.helpers.megatron import Tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FAMILIES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "mixtral",
    "deepseek-v3",
    "gemma2",
    "gemma3",
    "qwen3-moe",
)


def equal(source: Any, wanted: dict[str, Tensor]) -> None:
    assert source.names() == wanted.keys()
    for name, tensor in wanted.items():
        assert source.dtype(name) == tensor.dtype, name
        assert torch.equal(source.rows(name, 0, tensor.shape[0]), tensor), name


def written(opened: Opened, folder: Path, options: Options = Options()) -> Path:  # noqa: B008
    folder.mkdir()
    target = FORMAT.target(opened, options)
    for job in target.jobs():
        target.make(job, folder)
        assert (folder / job.file).stat().st_size == job.size
    target.finish(folder)
    return folder


def with_optimizer(name: str) -> Opened:
    """A model in bf16 with AdamW's states, random."""
    state = {
        key: tensor if key.endswith("correction_bias") else tensor.bfloat16()
        for key, tensor in pair(name).hf_state().items()
    }
    generator = torch.Generator().manual_seed(1)
    slots = {
        slot: Tensors(
            {
                key: torch.randn(tensor.shape, generator=generator)
                for key, tensor in state.items()
                if not key.endswith("correction_bias")
            }
        )
        for slot in ("master", "exp_avg", "exp_avg_sq")
    }
    return Opened("test", Path("x"), pair(name).hf.config.to_dict(), Tensors(state), slots, step=12)


# ---- round trips


@pytest.mark.parametrize("name", FAMILIES)
def test_to_megatron_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    hf_model(name).save_pretrained(tmp_path / "hf")
    options = Options(tensor=2, vocab_multiple=16)
    result = convert(tmp_path / "hf", tmp_path / "dist", "torch_dist", options, verify=True, workers=1)
    # Written for another vocabulary's padding and step, found by itself.
    back = convert(tmp_path / "dist", tmp_path / "back", "hf", verify=True, workers=1)
    before, after = SafetensorsFolder(tmp_path / "hf"), SafetensorsFolder(tmp_path / "back")
    equal(after, {key: before.rows(key, 0, before.shape(key)[0]) for key in before.names()})
    assert (back.kind, result.tensors) == ("torch_dist", back.tensors)
    assert {line.what for line in result.report} >= {"padded"}
    assert {line.what for line in back.report} >= {"trimmed"}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 101


def test_states_of_the_optimizer_go_along(tmp_path: Path) -> None:
    for name in ("llama-tied", "mixtral", "deepseek-v3"):
        opened = with_optimizer(name)
        folder = written(opened, tmp_path / name)
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "12"
        back = whole_model(FORMAT.open(folder, Options()))
        assert back.step == 12
        equal(back.weights, opened.weights.tensors)
        assert back.optimizer.keys() == opened.optimizer.keys()
        for slot, source in opened.optimizer.items():
            equal(back.optimizer[slot], source.tensors)
        assert FORMAT.open(folder, Options(optimizer=False)).optimizer == {}


def test_large_tensors_are_cut_and_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_files, "MOST_CHUNK_BYTES", 1000)
    monkeypatch.setattr(dcp_files, "_FILE_BYTES", 50_000)
    opened = with_optimizer("qwen3-moe")
    folder = written(opened, tmp_path / "c")
    assert len(list((folder / "iter_0000012").glob("*.distcp"))) > 5
    equal(whole_model(FORMAT.open(folder, Options())).weights, opened.weights.tensors)


def test_what_stands_on_the_disk(tmp_path: Path) -> None:
    """Names, shapes and files as megatron-core has them, read by torch."""
    opened = with_optimizer("qwen3-moe")  # layer 1 is dense: layers are apart
    step = written(opened, tmp_path / "c", Options(vocab_multiple=8)) / "iter_0000012"
    mark = json.loads((step / "metadata.json").read_text())
    assert mark["sharded_backend"] == "torch_dist" and mark["common_backend"] == "torch"
    folder = DcpFolder(step)
    shapes = {name: folder.shape(name) for name in folder.names()}
    assert shapes["embedding.word_embeddings.weight"] == (104, 48)
    assert shapes["decoder.layers.1.mlp.linear_fc1.weight"] == (112, 48)
    assert shapes["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"] == (5, 48, 48)
    assert shapes["decoder.layers.0.pre_mlp_layernorm.weight"] == (48,)
    assert shapes["optimizer.state.exp_avg.decoder.layers.0.mlp.router.weight"] == (5, 48)
    assert "decoder.layers.2.mlp.experts.experts.linear_fc2._extra_state/shard_4_5" in folder.index.blobs
    experts = torch.zeros(5, 48, 48, dtype=torch.bfloat16)
    key = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
    dcp.load({key: experts}, checkpoint_id=step, no_dist=True)
    state = opened.weights.tensors
    names = [f"model.layers.2.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up")]
    assert torch.equal(experts[3], torch.cat([state[name] for name in names]))
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(step / "common.pt", weights_only=True)
    assert (common["iteration"], common["args"].num_layers, common["args"].moe_layer_freq) == (
        12,
        3,
        [1, 0, 1],
    )
    uniform = DcpFolder(written(with_optimizer("llama"), tmp_path / "d") / "iter_0000012")
    assert uniform.shape("decoder.layers.mlp.linear_fc1.weight") == (2, 112, 48)
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2" in uniform.index.blobs


# ---- other forms of the same: saved by torch under the names of other versions


def megatron_state(name: str, form: str) -> dict[str, Tensor]:
    """A model's tensors as other settings and versions of megatron-core name and stack them."""
    spec = pair(name).spec
    table = MegatronTable(spec)
    from megatune.checkpoint.convert.megatron_names import ToMegatron

    source = ToMegatron(table, Tensors(pair(name).hf_state()))
    state: dict[str, Tensor] = {}
    for key, tensor in table.tensors.items():
        rows = source.rows(key, 0, tensor.shape[0])
        slot = written_slot(table, tensor)
        place = slot.key
        if form == "own layers":
            place = place.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
            place = place.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        if form == "apart" and tensor.layer is not None:
            place = place.replace("decoder.layers.", f"decoder.layers.{tensor.layer}.", 1)
            slot = dataclasses.replace(slot, lead=slot.lead[1:], axes=slot.axes[1:])
        if form == "singletons":
            if tensor.expert is not None:
                place = place.replace("experts.experts.", f"experts.experts.{tensor.expert}.")
                place = place.replace("decoder.layers.", f"decoder.layers.{tensor.layer}.", 1)
                slot = dataclasses.replace(slot, lead=(), axes=())
            if tensor.halves:
                for part, half in zip("wv", rows.chunk(2), strict=True):
                    state.setdefault(f"{place}_{part}", torch.zeros(*slot.axes, *half.shape))[slot.lead] = (
                        half
                    )
                continue
        place = f"module.{place}" if form == "nemo" else place
        state.setdefault(place, torch.zeros(*slot.axes, *rows.shape))[slot.lead] = rows
    return state


@pytest.mark.parametrize("form", ["own layers", "apart", "singletons", "nemo"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_forms_of_other_versions(name: str, form: str, tmp_path: Path) -> None:
    """Common state in a blob of the index, as newer versions write it."""
    step = tmp_path / "iter_0000003"
    common = io.BytesIO()
    torch.save([{"iteration": 3, "args": argparse.Namespace(padded_vocab_size=101)}], common)
    write(step, megatron_state(name, form), {"common_state/shard_0_1": common.getvalue()})
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    config = pair(name).hf.config.to_dict()
    write_json(tmp_path / "config.json", config)
    opened = whole_model(FORMAT.open(tmp_path, Options()))
    assert opened.step == 3
    equal(opened.weights, pair(name).hf_state())
    for key, tensor in pair(name).hf_state().items():
        assert torch.equal(opened.weights.rows(key, 3, 17), tensor[3:17]), key


def test_optimizer_states_that_have_no_place(tmp_path: Path) -> None:
    """Flat buckets belong to one layout: left out, with the reason."""
    step = tmp_path / "iter_0000003"
    state: dict[str, Any] = dict(megatron_state("llama", ""))
    bucket = (
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0."
    )
    state |= {bucket + slot: torch.zeros(100) for slot in ("param", "exp_avg", "exp_avg_sq")}
    state["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"] = torch.zeros(2, 1, 48 * 56)
    dcp.save(state, checkpoint_id=step, no_dist=True)
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    write_json(tmp_path / "config.json", pair("llama").hf.config.to_dict())
    opened = FORMAT.open(tmp_path, Options())
    assert opened.optimizer == {}
    why = {line.tensor: line.detail for line in opened.report if line.what == "skipped"}
    assert "not those of the model's weights in any layout; save with" in why[bucket + "exp_avg"]
    assert "shape" in why["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"]


# ---- the real thing


def te_names(state: dict[str, Any], spec: Any) -> dict[str, Any]:
    """A sharded state dict of Megatron's own layers, asking for what Transformer Engine's layers would ask for."""
    table = MegatronTable(spec)
    own = {tensor.key(tensor.layer, tensor.expert, "local"): tensor for tensor in table.tensors.values()}
    for name, sharded in state.items():
        if name in own and name.endswith("norm.weight"):
            sharded.key = written_slot(table, own[name]).key
    return state


def small(name: str) -> dict[str, Any]:
    """The config of a case, with what megatron-core's own layers can be."""
    config = hf_config(name)
    if name == "mixtral":
        config.sliding_window = None
    if name.startswith("deepseek"):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        config.num_experts_per_tok = 4  # Megatron scores groups by their best topk / group_topk experts
    return config.to_dict()


def megatron_saves_and_loads(rank: int, world: int, names: list[str], root: str) -> None:
    """Saves a random model of each case and its logits; ours, converted to a model folder and back, loads again."""
    from transformers import AutoModelForCausalLM

    mcore.prepare(tensor=world)
    from megatron.core import dist_checkpointing

    for name in names:
        home, config = Path(root) / name, small(name)
        spec = family_for(config).spec(config)
        model = mcore.gpt(spec, 128, tensor=world)
        step = home / "megatron" / "iter_0000007"
        if rank == 0:
            step.mkdir(parents=True)
            write_json(home / "config.json", config)
        torch.distributed.barrier()
        dist_checkpointing.save(model.sharded_state_dict(), str(step))
        tokens = torch.randint(0, spec.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
        logits = mcore.logits(model, tokens) if world == 1 else None
        if rank == 0:
            options = Options(like=str(home / "config.json"))
            convert(home / "megatron", home / "hf", "hf", options, verify=True, workers=1)
            convert(home / "hf", home / "dist", "torch_dist", verify=True, workers=1)
            theirs = AutoModelForCausalLM.from_pretrained(home / "hf", attn_implementation="eager").eval()
            with torch.no_grad():
                got = theirs(tokens).logits
            if logits is not None:
                torch.testing.assert_close(got, logits[..., : spec.vocab_size], rtol=0, atol=2e-5)
        torch.distributed.barrier()
        other = mcore.gpt(spec, 128, seed=1, tensor=world)
        asked = te_names(other.sharded_state_dict(), spec)
        loaded = dist_checkpointing.load(asked, str(home / "dist" / "release"), strict="raise_unexpected")
        other.load_state_dict({key: loaded[key] for key in asked}, strict=True)
        assert (loaded["args"].hidden_size, loaded["checkpoint_version"]) == (spec.hidden_size, 3.0)
        for key, tensor in other.state_dict().items():
            if isinstance(tensor, Tensor):
                wanted = model.state_dict()[key]
                own = wanted.shape[0]
                if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    own = max(0, min(own, spec.vocab_size - rank * own))  # what follows is padding
                assert torch.equal(tensor[:own], wanted[:own]), (name, key)


@mcore.needs_mcore
def test_megatron_core_on_either_side(tmp_path: Path) -> None:
    names = ["llama", "llama-tied", "qwen2", "qwen3", "mixtral", "deepseek-v3"]
    run_ranks(megatron_saves_and_loads, 1, names, str(tmp_path), timeout=240)


@mcore.needs_mcore
def test_megatron_core_with_two_processes(tmp_path: Path) -> None:
    run_ranks(megatron_saves_and_loads, 2, ["qwen3"], str(tmp_path), timeout=240)


def optimizer_of(model: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model.bfloat16().config.bf16 = True
    whole = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
    )
    settings = OptimizerConfig(
        lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, [whole])
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for buffer in whole.buffers + whole.expert_parallel_buffers:
            buffer.grad_data.normal_(generator=generator)
        assert optimizer.step()[0]
    return optimizer


def megatron_keeps_the_optimizer(rank: int, world: int, names: list[str], root: str) -> None:
    """The distributed optimizer of megatron-core saves, we read; we write, it loads: bit for bit."""
    mcore.prepare()
    mcore.without_cuda()
    from megatron.core import dist_checkpointing

    how = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }

    def states(model: Any, optimizer: Any, loading: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        asked = te_names(model.sharded_state_dict(metadata=dict(how)), spec)
        return asked, optimizer.sharded_state_dict(asked, is_loading=loading, metadata=dict(how))

    for name in names:
        home, config = Path(root) / name, small(name)
        spec = family_for(config).spec(config)
        step = home / "megatron" / "iter_0000002"
        step.mkdir(parents=True)
        write_json(home / "config.json", config)
        model = mcore.gpt(spec, 128)
        optimizer = optimizer_of(model)
        weights, moments = states(model, optimizer, False)
        dist_checkpointing.save(
            {**weights, "optimizer": moments, "iteration": 2}, str(step), content_metadata=how
        )
        opened = whole_model(FORMAT.open(home / "megatron", Options(like=str(home / "config.json"))))
        assert opened.step == 2 and opened.optimizer.keys() == {"master", "exp_avg", "exp_avg_sq"}
        for key in opened.weights.names():
            rows = opened.weights.shape(key)[0]
            if key in opened.optimizer["master"].names():
                master = opened.optimizer["master"].rows(key, 0, rows)
                assert torch.equal(master.bfloat16(), opened.weights.rows(key, 0, rows)), key
                assert opened.optimizer["exp_avg"].rows(key, 0, rows).abs().sum() > 0, key
        written(opened, home / "dist")
        other = mcore.gpt(spec, 128, seed=1)
        fresh = optimizer_of(other)
        asked, moments = states(other, fresh, True)
        loaded = dist_checkpointing.load({**asked, "optimizer": moments}, str(home / "dist" / "iter_0000002"))
        other.load_state_dict({key: loaded[key] for key in asked}, strict=True)
        fresh.load_state_dict(loaded["optimizer"])
        for key, tensor in model.named_parameters():
            again = dict(other.named_parameters())[key]
            rows = (
                101 if key in ("embedding.word_embeddings.weight", "output_layer.weight") else tensor.shape[0]
            )
            assert torch.equal(again[:rows], tensor[:rows]), (name, key)
            before, after = (
                side.chained_optimizers[0]._get_main_param_and_optimizer_states(parameter)
                for side, parameter in ((optimizer, tensor), (fresh, again))
            )
            assert {"param", "exp_avg", "exp_avg_sq"} <= before.keys()
            for slot, state in before.items():
                count = state.numel() if slot == "step" else rows * tensor[0].numel()
                assert torch.equal(after[slot].view(-1)[:count], state.view(-1)[:count]), (name, key, slot)


@mcore.needs_mcore
def test_megatron_core_keeps_the_optimizer(tmp_path: Path) -> None:
    run_ranks(megatron_keeps_the_optimizer, 1, ["llama", "deepseek-v3"], str(tmp_path), timeout=240)


# ---- folders that lie, and errors


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["common.pt", "common.pt, old", "args", "metadata", "blob"])
def test_bombs_do_nothing(where: str, tmp_path: Path) -> None:
    folder = written(with_optimizer("llama"), tmp_path / "c")
    step, made = folder / "iter_0000012", tmp_path / "made"
    bomb = _Bomb(made)
    if where == "common.pt":
        torch.save(bomb, step / "common.pt")
    elif where == "common.pt, old":
        torch.save(bomb, step / "common.pt", _use_new_zipfile_serialization=False)
    elif where == "args":
        torch.save({"iteration": 12, "args": bomb}, step / "common.pt")
    elif where == "metadata":
        (step / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": bomb}))
    else:
        (step / "common.pt").unlink()
        with open(step / METADATA, "rb") as file:
            metadata = pickle.load(file)
        torch.save([bomb], step / "bomb.distcp")
        index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
        place = type(metadata.storage_data[index])("bomb.distcp", 0, (step / "bomb.distcp").stat().st_size)
        metadata.state_dict_metadata["common_state/shard_0_1"] = metadata.state_dict_metadata[index.fqn]
        metadata.storage_data[type(index)("common_state/shard_0_1")] = place
        (step / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError):
        FORMAT.open(folder, Options())
    assert not made.exists()


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    folder = written(with_optimizer("llama"), tmp_path / "c")
    step = folder / "iter_0000012"
    with pytest.raises(CheckpointError, match="no whole step 5; there is 12"):
        FORMAT.open(folder, Options(step=5))
    write_json(tmp_path / "other.json", hf_config("llama").to_dict() | {"intermediate_size": 64})
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight has shape \[2, 112, 48\].*\[2, 128, 48\]"):
        FORMAT.open(folder, Options(like=str(tmp_path / "other.json")))
    write_json(tmp_path / "deep.json", hf_config("llama").to_dict() | {"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"\[2, .*\[3, "):
        FORMAT.open(folder, Options(like=str(tmp_path / "deep.json")))
    write_json(tmp_path / "tied.json", hf_config("llama").to_dict() | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match="output_layer.weight .* belongs to no parameter"):
        FORMAT.open(folder, Options(like=str(tmp_path / "tied.json")))
    (step / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(CheckpointError, match="zarr"):
        FORMAT.open(folder, Options())
    (step / "metadata.json").unlink()
    assert not FORMAT.detect(folder)


def test_a_config_is_made_from_the_arguments(tmp_path: Path) -> None:
    """Without config.json beside it: what Megatron's arguments say is the same model."""
    for name in ("llama", "qwen2", "qwen3"):
        folder = written(with_optimizer(name), tmp_path / name)
        (folder / "config.json").unlink()
        opened = whole_model(FORMAT.open(folder, Options()))
        config = pair(name).hf.config.to_dict()
        assert family_for(opened.hf_config).spec(opened.hf_config) == family_for(config).spec(config)
        equal(opened.weights, with_optimizer(name).weights.tensors)
