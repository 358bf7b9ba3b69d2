"""Folders of torch.distributed.checkpoint: written by torch itself and read here, and the other way round."""

from __future__ import annotations

import io
import os
import pickle
import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatune.checkpoint.convert import dcp_files
from megatune.checkpoint.convert.base import Options
from megatune.checkpoint.convert.core import convert
from megatune.checkpoint.convert.dcp import FORMAT
from megatune.checkpoint.convert.dcp_files import Blob, DcpFolder, cut, plan_files, torch_blob, write_metadata
from megatune.checkpoint.convert.dcp_metadata import METADATA, Chunk, Place, Stored, read_index
from megatune.checkpoint.convert.names import whole_model
from megatune.checkpoint.hf import write_json
from megatune.errors import CheckpointError
from tests.helpers.dist import run_ranks
from tests.helpers.families import hf_config, hf_model, pair

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*__module__.*")


def tensors_of(folder: DcpFolder) -> dict[str, Tensor]:
    shapes = {name: folder.shape(name) for name in folder.names()}
    return {name: folder.box(name, (0,) * len(shape), shape) for name, shape in shapes.items()}


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(13, 7, generator=generator),
        "half": torch.randn(5, 6, generator=generator).bfloat16(),
        "cube": torch.randn(3, 4, 5, generator=generator).half(),
        "eight": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "count": torch.tensor(7, dtype=torch.int32),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(6, 4, generator=generator).T,
    }


def write(folder: Path, tensors: dict[str, Tensor], blobs: dict[str, bytes] | None = None) -> None:
    """As a converter does: cut into parts, parts into files, the index last."""
    folder.mkdir()
    parts = [
        part
        for name, tensor in tensors.items()
        for part in cut(
            name,
            tensor.dtype,
            (0,) * tensor.dim(),
            tuple(tensor.shape),
            lambda start, stop, tensor=tensor: tensor[start:stop] if tensor.dim() else tensor,
        )
    ]
    files = plan_files([*parts, *(Blob(name, data) for name, data in (blobs or {}).items())])
    for file in files:
        file.write(folder)
        assert (folder / file.name).stat().st_size == file.size
    write_metadata(folder, files)


# ---- torch writes, we read


def test_reads_what_torch_saves(tmp_path: Path) -> None:
    state = some_tensors() | {"words": {"deep": [1, "two", {"three": 3.5}]}}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    folder = DcpFolder(tmp_path / "c")
    assert folder.names() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert folder.dtype(name) == tensor.dtype and folder.shape(name) == tuple(tensor.shape)
        got = folder.box(name, (0,) * tensor.dim(), tuple(tensor.shape))
        assert got.is_contiguous() and torch.equal(got.float(), tensor.float()), name
    assert torch.equal(folder.rows("matrix", 3, 9), state["matrix"][3:9])
    assert torch.equal(folder.box("cube", (1, 0, 2), (2, 3, 2)), state["cube"][1:3, :3, 2:4])
    assert {folder.blob(name) for name in folder.index.blobs} == {1, "two", 3.5}
    assert folder.index.paths["words.deep.1"] == ("words", "deep", 1)
    with pytest.raises(ValueError, match="matrix"):
        folder.rows("matrix", 9, 14)


def save_sharded(rank: int, world: int, folder: str) -> dict[str, Any]:
    """A model of transformers under FSDP2 after two steps of AdamW, saved as torchtitan saves: model and optimizer by
    name. Returns what it is as a whole."""
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.fsdp import fully_shard

    model = hf_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        tokens = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(2 * step + rank))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = states.StateDictOptions(flatten_optimizer_state_dict=True)
    weights = states.get_model_state_dict(model)
    moments = states.get_optimizer_state_dict(model, optimizer, options=options)
    step = {"step": torch.tensor(2, dtype=torch.int32)}
    dcp.save(
        {"model": weights, "optimizer": moments, "train_state": step, "lr_scheduler": {"last_epoch": 2}},
        checkpoint_id=folder,
    )
    full = states.StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    whole = states.get_model_state_dict(model, options=full)
    whole_moments = states.get_optimizer_state_dict(model, optimizer, options=full)
    return {"weights": dict(whole), "moments": {k: v for k, v in whole_moments.items() if "exp_avg" in k}}


def test_an_fsdp_model_with_its_optimizer(tmp_path: Path) -> None:
    saved = run_ranks(save_sharded, 2, str(tmp_path / "step-2"))[0]
    write_json(tmp_path / "like.json", hf_config("llama").to_dict())
    opened = FORMAT.open(tmp_path, Options(like=str(tmp_path / "like.json")))
    assert FORMAT.detect(tmp_path) and FORMAT.detect(tmp_path / "step-2")
    whole = whole_model(opened)
    assert whole.step == 2
    assert whole.weights.names() == saved["weights"].keys() and len(whole.weights.names()) == 21
    for name, tensor in saved["weights"].items():
        assert torch.equal(whole.weights.rows(name, 0, tensor.shape[0]), tensor), name
        for slot in ("exp_avg", "exp_avg_sq"):
            wanted = saved["moments"][f"state.{name}.{slot}"]
            assert wanted.abs().sum() > 0
            assert torch.equal(whole.optimizer[slot].rows(name, 0, tensor.shape[0]), wanted), (name, slot)
    skipped = {line.tensor for line in whole.report if line.what == "skipped"}
    assert "train_state.step" in skipped and any(".step" in name for name in skipped)
    assert not FORMAT.open(tmp_path, Options(like=str(tmp_path / "like.json"), optimizer=False)).optimizer


def titan_state(name: str, lead: str = "", late: bool = False) -> dict[str, Tensor]:
    """A model's weights under the names, and with the order of rows, of torchtitan. `late`: its newer names."""
    case, spec = pair(name), pair(name).spec
    titan: dict[str, Tensor] = {}
    qkv = "attention.qkv_linear." if late and name != "llama" else "attention."
    stacked: dict[str, dict[int, Tensor]] = {}
    rules = {
        "self_attn.q_proj": f"{qkv}wq",
        "self_attn.k_proj": f"{qkv}wk",
        "self_attn.v_proj": f"{qkv}wv",
        "self_attn.o_proj": "attention.wo",
        "self_attn.q_a_proj": "attention.wq_a",
        "self_attn.q_a_layernorm": "attention.q_norm",
        "self_attn.q_b_proj": "attention.wq_b",
        "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
        "self_attn.kv_a_layernorm": "attention.kv_norm",
        "self_attn.kv_b_proj": "attention.wkv_b",
        "self_attn": "attention",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
        "mlp.shared_experts.up_proj": "moe.shared_experts.w3",
        "mlp.shared_experts.down_proj": "moe.shared_experts.w2",
        "mlp.gate.e_score_correction_bias": "moe.expert_bias_E" if late else "moe.expert_bias",
        "mlp.gate": "moe.router.gate",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outside = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "lm_head" if late else "output",
    }
    for key, tensor in case.hf_state().items():
        expert = re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj", key)
        if expert:
            matrix = {"gate": "w1", "up": "w3", "down": "w2"}[expert[3]]
            stacked.setdefault(f"layers.{expert[1]}.moe.experts.{matrix}", {})[int(expert[2])] = tensor
            continue
        layer = re.match(r"model\.(layers\.\d+\.)(.*)", key)
        if not layer:
            stem = key.removesuffix(".weight")
            titan[f"{outside[stem]}.weight"] = tensor
            continue
        stem = next(rule for rule in sorted(rules, key=len, reverse=True) if layer[2].startswith(rule))
        if name == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = spec.num_heads if "q_proj" in stem else spec.num_kv_heads
            size = tensor.shape[0] // heads
            # Row 2 i + j of a head is row i + j size / 2 of Hugging Face's.
            order = [
                h * size + i + j * size // 2 for h in range(heads) for i in range(size // 2) for j in range(2)
            ]
            tensor = tensor[order]
        titan[f"{layer[1]}{rules[stem]}{layer[2].removeprefix(stem)}"] = tensor
    titan |= {key: torch.stack([found[e] for e in sorted(found)]) for key, found in stacked.items()}
    return {lead + key: tensor.clone() for key, tensor in titan.items()}


@pytest.mark.parametrize(
    ("name", "lead", "late"),
    [("llama", "", False), ("llama", "model.", True), ("qwen3", "", True), ("deepseek-v3", "", False)],
)
def test_torchtitan_names(name: str, lead: str, late: bool, tmp_path: Path) -> None:
    state = titan_state(name, lead, late)
    dcp.save(state | {"freqs_cis": torch.zeros(4)}, checkpoint_id=tmp_path / "c", no_dist=True)
    write_json(tmp_path / "config.json", pair(name).hf.config.to_dict())
    opened = whole_model(FORMAT.open(tmp_path / "c", Options()))
    wanted = pair(name).hf_state()
    assert opened.weights.names() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(opened.weights.rows(key, 0, tensor.shape[0]), tensor), key
        assert torch.equal(opened.weights.rows(key, 1, tensor.shape[0] - 2), tensor[1:-2]), key


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma2", "mixtral"])
def test_models_of_transformers_as_they_are_in_memory(name: str, tmp_path: Path) -> None:
    """Tied heads are there twice, experts are stacked."""
    model = hf_model(name)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "c", no_dist=True)
    write_json(tmp_path / "config.json", model.config.to_dict())
    opened = whole_model(FORMAT.open(tmp_path / "c", Options()))
    wanted = pair(name).hf_state()
    assert opened.weights.names() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(opened.weights.rows(key, 0, tensor.shape[0]), tensor), key


def test_converts_to_a_model_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dcp.save(titan_state("llama"), checkpoint_id=tmp_path / "c" / "step-30", no_dist=True)
    write_json(tmp_path / "c" / "config.json", pair("llama").hf.config.to_dict())
    result = convert(tmp_path / "c", tmp_path / "hf", "hf", verify=True, workers=1)
    assert (result.kind, result.step, result.verified) == ("dcp", 30, True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, pair("llama").hf(tokens).logits)


# ---- what does not fit


def test_says_which_model_is_meant(tmp_path: Path) -> None:
    dcp.save(titan_state("llama"), checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(CheckpointError, match="--like"):
        FORMAT.open(tmp_path / "c", Options())
    write_json(tmp_path / "config.json", hf_config("qwen3").to_dict())
    with pytest.raises(CheckpointError, match="does not fit model.layers.0.self_attn.q_proj.weight"):
        FORMAT.open(tmp_path / "c", Options())
    with pytest.raises(CheckpointError, match="has no step 5"):
        FORMAT.open(tmp_path, Options(step=5))


def test_unknown_and_missing_weights_are_errors(tmp_path: Path) -> None:
    state = titan_state("llama")
    write_json(tmp_path / "config.json", pair("llama").hf.config.to_dict())
    dcp.save(state | {"layers.0.attention.gate": torch.zeros(3)}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.gate \[3\] belongs to no parameter"):
        FORMAT.open(tmp_path / "a", Options())
    del state["layers.1.feed_forward.w2.weight"]
    dcp.save(state, checkpoint_id=tmp_path / "b", no_dist=True)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        whole_model(FORMAT.open(tmp_path / "b", Options()))


# ---- we write, torch reads


def test_torch_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_files, "MOST_CHUNK_BYTES", 100)
    monkeypatch.setattr(dcp_files, "_FILE_BYTES", 3000)
    tensors = some_tensors()
    write(tmp_path / "c", tensors, {"notes/shard_0_1": torch_blob([None, {"a": 1}])})
    assert len(list((tmp_path / "c").glob("*.distcp"))) > 3
    assert len(read_index(tmp_path / "c").tensors["matrix"].chunks) > 1
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    notes = {"notes/shard_0_1": io.BytesIO()}
    dcp.load(notes, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name].float(), tensor.float()), name
    assert notes["notes/shard_0_1"] == [None, {"a": 1}]
    ours = tensors_of(DcpFolder(tmp_path / "c"))
    assert all(torch.equal(ours[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_the_chunks_near_a_box_are_all_that_it_touches() -> None:
    """Stacked, cut along the rows too, of unequal sizes, flat: the same as looking at all of them."""
    generator = torch.Generator().manual_seed(0)
    place = Place("x", 0, 1)

    def cells(shape: tuple[int, ...], cuts: list[list[int]]) -> Stored:
        edges = [list(pairwise([0, *cut, size])) for cut, size in zip(cuts, shape, strict=True)]
        found = [
            Chunk(tuple(a for a, _ in box), tuple(b - a for a, b in box), place) for box in product(*edges)
        ]
        order = torch.randperm(len(found), generator=generator)
        return Stored(torch.float32, shape, tuple(found[int(number)] for number in order))

    for stored in (
        cells((6, 9, 12), [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8], [6]]),
        cells((6, 40), [[1, 2, 3, 4, 5], [3, 4, 30]]),
        cells((97,), [[1, 2, 30, 31, 32, 40, 41, 42, 43, 50, 60, 61, 62, 70, 80, 90, 91]]),
    ):
        for _ in range(200):
            draws = [torch.randint(0, n, (2,), generator=generator).tolist() for n in stored.shape]
            box = [(min(two), max(two) + 1) for two in draws]
            offsets, sizes = [a for a, _ in box], [b - a for a, b in box]
            touched = {
                chunk.offsets
                for chunk in stored.chunks
                if all(
                    a < o + n and o < b for (a, b), o, n in zip(box, chunk.offsets, chunk.sizes, strict=True)
                )
            }
            near = stored.near(offsets, sizes)
            assert touched <= {chunk.offsets for chunk in near}
        assert len(stored.near([0] * len(stored.shape), [1] * len(stored.shape))) < len(stored.chunks)


def load_sharded(rank: int, world: int, folder: str) -> bool:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    wanted = some_tensors()["matrix"]
    state = {"matrix": distribute_tensor(torch.zeros_like(wanted), mesh, [Shard(1)])}
    dcp.load(state, checkpoint_id=folder)
    return torch.equal(state["matrix"].full_tensor(), wanted)


def test_torch_reads_it_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_files, "MOST_CHUNK_BYTES", 100)
    write(tmp_path / "c", some_tensors())
    assert run_ranks(load_sharded, 2, str(tmp_path / "c")) == [True, True]


def test_a_part_that_is_not_as_planned_is_a_bug(tmp_path: Path) -> None:
    (part,) = cut("a", torch.float32, (0,), (4,), lambda start, stop: torch.zeros(3))
    with pytest.raises(ValueError, match="announced"):
        list(part.write())


# ---- folders that lie


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(folder: Path) -> Path:
    dcp.save({"a": torch.arange(12.0).view(4, 3), "b": {"c": "text"}}, checkpoint_id=folder, no_dist=True)
    return folder


def change(folder: Path, how: Any) -> None:
    """Let `how` change torch's own metadata."""
    with open(folder / METADATA, "rb") as file:
        metadata = pickle.load(file)
    how(metadata)
    with open(folder / METADATA, "wb") as file:
        pickle.dump(metadata, file)


def infos(metadata: Any) -> list[Any]:
    return [info for index, info in metadata.storage_data.items() if index.fqn == "a"]


@pytest.mark.parametrize("where", ["root", "planner", "storage", "dtype", "key"])
def test_bombs_in_the_index_do_nothing(where: str, tmp_path: Path) -> None:
    folder, made = saved(tmp_path / "c"), tmp_path / "made"
    bomb = _Bomb(made)

    def plant(metadata: Any) -> None:
        if where == "planner":
            metadata.planner_data = {"a": bomb}
        elif where == "storage":
            metadata.storage_data = bomb
        elif where == "dtype":
            metadata.state_dict_metadata["a"].properties = bomb
        elif where == "key":
            metadata.storage_data[bomb] = 1

    change(folder, plant)
    if where == "root":
        (folder / METADATA).write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        DcpFolder(folder)
    assert not made.exists()
    with open(folder / METADATA, "rb") as file:
        pickle.load(file)
    assert made.exists(), "the bomb is none: this test proves nothing"


def test_a_bomb_in_the_data_does_nothing(tmp_path: Path) -> None:
    folder, made = saved(tmp_path / "c"), tmp_path / "made"
    buffer = io.BytesIO()
    torch.save(_Bomb(made), buffer)
    data = buffer.getvalue()
    (folder / "bomb.distcp").write_bytes(data)

    def plant(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path, info.offset, info.length = "bomb.distcp", 0, len(data)

    change(folder, plant)
    with pytest.raises(CheckpointError, match="attack|not the torch.float32 tensor"):
        DcpFolder(folder).rows("a", 0, 4)
    with pytest.raises(CheckpointError):
        DcpFolder(folder).blob("b.c")
    assert not made.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "x/../../secret", "..", "", "a\0b", "sub\\x"])
def test_paths_stay_in_the_folder(path: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    change(folder, lambda metadata: [setattr(info, "relative_path", path) for info in infos(metadata)])
    with pytest.raises(CheckpointError, match="no file of this folder"):
        DcpFolder(folder)


def overlap(metadata: Any) -> None:
    """As many elements as there are, but row 1 twice and row 3 never."""
    entry, (place,) = metadata.state_dict_metadata["a"], infos(metadata)
    index = next(index for index in metadata.storage_data if index.fqn == "a")
    entry.chunks = [type(entry.chunks[0])(torch.Size([n, 0]), torch.Size([2, 3])) for n in range(2)]
    metadata.storage_data[type(index)("a", torch.Size([1, 0]))] = place


LIES: dict[str, tuple[Any, str]] = {
    "missing file": (lambda m: setattr(infos(m)[0], "relative_path", "__9_9.distcp"), "missing"),
    "offset beyond the end": (lambda m: setattr(infos(m)[0], "offset", 1 << 60), "refers to byte"),
    "negative offset": (lambda m: setattr(infos(m)[0], "offset", -5), "no place"),
    "negative length": (lambda m: setattr(infos(m)[0], "length", -1), "no place"),
    "absurd length": (lambda m: setattr(infos(m)[0], "length", 1 << 62), "refers to byte"),
    "offset is text": (lambda m: setattr(infos(m)[0], "offset", "0"), "no place"),
    "absurd shape": (
        lambda m: (
            setattr(m.state_dict_metadata["a"], "size", torch.Size([1 << 40, 3])),
            setattr(m.state_dict_metadata["a"].chunks[0], "sizes", torch.Size([1 << 40, 3])),
        ),
        "would need",
    ),
    "a hole": (lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([5, 3])), "do not cover"),
    "twice": (
        lambda m: m.state_dict_metadata["a"].chunks.append(m.state_dict_metadata["a"].chunks[0]),
        "do not cover",
    ),
    "outside": (
        lambda m: setattr(m.state_dict_metadata["a"].chunks[0], "sizes", torch.Size([3, 4])),
        "do not cover",
    ),
    "a hole and an overlap": (overlap, "do not cover"),
    "no storage": (lambda m: m.storage_data.clear(), "damaged"),
    "transformed": (lambda m: setattr(infos(m)[0], "transform_descriptors", ["zstd"]), "transformed"),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.int32),
        "not the torch.int32 tensor",
    ),
    "another shape": (
        lambda m: (
            setattr(m.state_dict_metadata["a"], "size", torch.Size([3, 4])),
            setattr(m.state_dict_metadata["a"].chunks[0], "sizes", torch.Size([3, 4])),
        ),
        r"tensor \[3, 4\]",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_one_clear_error(lie: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    change(folder, LIES[lie][0])
    with pytest.raises(CheckpointError, match=LIES[lie][1]):
        found = DcpFolder(folder)
        found.rows("a", 0, 3)


def test_chunks_that_share_bytes_do_not_make_a_folder_large(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")

    def grow(metadata: Any) -> None:
        entry, (place,) = metadata.state_dict_metadata["a"], infos(metadata)
        index = next(index for index in metadata.storage_data if index.fqn == "a")
        entry.size = torch.Size([4000, 3])
        entry.chunks = [
            type(entry.chunks[0])(torch.Size([4 * n, 0]), torch.Size([4, 3])) for n in range(1000)
        ]
        for n in range(1000):
            metadata.storage_data[type(index)("a", torch.Size([4 * n, 0]))] = place

    change(folder, grow)
    with pytest.raises(CheckpointError, match="announces 48000 bytes"):
        DcpFolder(folder)


def test_cut_off_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    whole = (folder / METADATA).read_bytes()
    for length in (0, 1, 40, len(whole) // 2, len(whole) - 1):
        (folder / METADATA).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            DcpFolder(folder)
    (folder / METADATA).write_bytes(whole)
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="refers to byte|damaged"):
        DcpFolder(folder).rows("a", 0, 4)


def test_random_bytes_in_the_index_never_crash(tmp_path: Path) -> None:
    """Every damaged index is a CheckpointError, or still says what it said of `a`."""
    folder = saved(tmp_path / "c")
    whole = bytearray((folder / METADATA).read_bytes())
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(int(os.environ.get("MEGATUNE_FUZZ", "300"))):
        place = int(torch.randint(0, len(whole), (), generator=generator))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        (folder / METADATA).write_bytes(damaged)
        try:
            found = DcpFolder(folder)
            if "a" in found.names():
                found.rows("a", 0, min(4, found.shape("a")[0]))
        except CheckpointError:
            refused += 1
    assert refused > 50
