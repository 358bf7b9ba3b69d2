"""Legacy Megatron checkpoints: round trips at many layouts, what other versions of Megatron wrote, what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatune.checkpoint.convert import megatron_legacy_write
from megatune.checkpoint.convert.base import Line, Opened, Options
from megatune.checkpoint.convert.megatron_config import OUR_CONFIG
from megatune.checkpoint.convert.megatron_legacy import FORMAT
from megatune.checkpoint.convert.megatron_legacy_write import LegacyTarget
from megatune.checkpoint.convert.megatron_names import MegatronTable
from megatune.errors import CheckpointError, ConfigError, MegatuneError, ParallelError
from megatune.models.registry import family_for
from tests.helpers.megatron import FAMILIES, Tensors, model, same_tensors

FILE = "model_optim_rng.pt"


def write(opened: Opened, folder: Path, backend: str = "te", **layout: int) -> LegacyTarget:
    """`opened` as a legacy checkpoint."""
    target = LegacyTarget(opened, Options(**{"vocab_multiple": 4, **layout}), backend)
    for job in target.jobs():
        target.make(job, folder)
        size = (folder / job.file).stat().st_size
        assert abs(size - job.size) <= 0.1 * size + 32768
    target.finish(folder)
    return target


def read(folder: Path, **options: Any) -> Opened:
    assert FORMAT.detect(folder)
    return FORMAT.open(folder, Options(**options))


def spec_of(config: dict[str, Any]):
    return family_for(config).spec(config)


def load(path: Path) -> dict[str, Any]:
    """A rank's file, by torch itself."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def change(path: Path, how: Callable[[dict[str, Any]], None]) -> None:
    content = load(path)
    how(content)
    torch.save(content, path)


def every_file(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*/{FILE}"))


def args_changed(folder: Path, **values: Any) -> None:
    """The same checkpoint with other arguments; None takes one away. What we put beside them goes too."""

    def how(content: dict[str, Any]) -> None:
        for key, value in ({OUR_CONFIG: None} | values).items():
            delattr(content["args"], key) if value is None else setattr(content["args"], key, value)

    for path in every_file(folder):
        change(path, how)


def lines(opened: Opened | LegacyTarget, what: str) -> list[Line]:
    return [line for line in opened.report if line.what == what]


@pytest.mark.parametrize("backend", ["te", "local"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, backend: str, tmp_path: Path) -> None:
    source = model(name)
    experts = {"expert": 2} if spec_of(source.hf_config).moe else {}
    first = write(source, tmp_path / "a", backend, tensor=2, pipeline=2, virtual=2, **experts)
    names = {path.parent.name for path in every_file(tmp_path / "a")}
    assert len(names) == 4 * experts.get("expert", 1)
    assert ("mp_rank_01_001_001" if experts else "mp_rank_01_001") in names
    between = read(tmp_path / "a")
    assert same_tensors(between.weights, source.weights) == []
    second = write(between, tmp_path / "b", backend, tensor=4)
    back = read(tmp_path / "b")
    assert same_tensors(back.weights, source.weights) == []
    assert back.hf_config == source.hf_config and back.step is None
    tied = spec_of(source.hf_config).tied_embeddings
    assert [line.tensor for line in lines(first, "tied")] == (["output_layer.weight"] if tied else [])
    assert [line.tensor for line in lines(between, "tied")] == (["lm_head.weight"] if tied else [])
    # 37 tokens: 40 rows at two ranks, 48 at four.
    assert all(line.detail.startswith("11 rows of zeros") for line in lines(second, "padded"))
    assert len(lines(second, "padded")) == len(lines(back, "trimmed")) == (1 if tied else 2)
    assert "the last 11 of 48 rows" in lines(back, "trimmed")[0].detail
    assert lines(back, "mapped") == lines(between, "mapped") == []  # all replicas are equal


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"pipeline": 4},
        {"expert": 4},
        {"tensor": 2, "expert": 2},
        {"pipeline": 2, "virtual": 2, "expert": 2},
    ],
    ids=str,
)
def test_names_of_folders_are_read_by_the_arguments(layout: dict[str, int], tmp_path: Path) -> None:
    # mp_rank_00_001 is the second stage in one of these and the second share of the experts in another.
    write(model("mixtral"), tmp_path, **layout)
    assert same_tensors(read(tmp_path).weights, model("mixtral").weights) == []


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("gemma")])
def test_the_config_follows_from_megatrons_arguments(name: str, tmp_path: Path) -> None:
    source = model(name)
    write(source, tmp_path, tensor=2, pipeline=2)
    args_changed(tmp_path)
    found = read(tmp_path)
    assert OUR_CONFIG not in vars(load(every_file(tmp_path)[0])["args"])
    assert spec_of(found.hf_config) == spec_of(source.hf_config)
    assert same_tensors(found.weights, source.weights) == []


def test_like_says_what_the_arguments_do_not(tmp_path: Path) -> None:
    source = model("gemma2")
    write(source, tmp_path / "x", tensor=2)
    args_changed(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"no supported family \(swiglu is off\).*--like"):
        read(tmp_path / "x")
    (tmp_path / "like").mkdir()
    (tmp_path / "like/config.json").write_text(json.dumps(source.hf_config))
    found = read(tmp_path / "x", like=str(tmp_path / "like"))
    assert same_tensors(found.weights, source.weights) == [] and found.extras == tmp_path / "like"
    with pytest.raises(CheckpointError, match="nowhere"):
        read(tmp_path / "x", like=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("true_vocab", "rows", "what"), [(37, 37, "trimmed"), (None, 40, "padded"), (4000, 40, "padded")]
)
def test_true_vocabulary(true_vocab: int | None, rows: int, what: str, tmp_path: Path) -> None:
    write(model("llama"), tmp_path, tensor=2)
    args_changed(tmp_path, vocab_size=true_vocab)
    found = read(tmp_path)
    assert found.weights.shape("lm_head.weight") == (rows, 32)
    assert lines(found, what)
    head = model("llama").weights.rows("lm_head.weight", 0, 37)
    assert torch.equal(found.weights.rows("lm_head.weight", 0, 37), head)


def test_stages_of_any_number_of_layers(tmp_path: Path) -> None:
    """First and last stages may be smaller or larger: the files say how many layers they have."""
    write(model("llama"), tmp_path, pipeline=2)
    paths = every_file(tmp_path)
    first, second = (load(path) for path in paths)
    moved = {key: value for key, value in first["model"].items() if "layers.1." in key}
    for key in moved:
        del first["model"][key]
    for number in (2, 1, 0):
        for key in [key for key in second["model"] if f"layers.{number}." in key]:
            second["model"][key.replace(f"layers.{number}.", f"layers.{number + 1}.")] = second["model"].pop(
                key
            )
    second["model"] |= {key.replace("layers.1.", "layers.0."): value for key, value in moved.items()}
    for path, content in zip(paths, (first, second), strict=True):
        torch.save(content, path)
    assert same_tensors(read(tmp_path).weights, model("llama").weights) == []


def test_portions_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(model("mixtral"), tmp_path / "a", tensor=2)
    monkeypatch.setattr(megatron_legacy_write, "_PORTION_BYTES", 300)
    write(model("mixtral"), tmp_path / "b", tensor=2)
    for path in every_file(tmp_path / "a"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    weights, whole = read(tmp_path / "b").weights, model("mixtral").weights
    for name in whole.names():
        rows = whole.shape(name)[0]
        parts = [weights.rows(name, start, min(start + 3, rows)) for start in range(0, rows, 3)]
        assert torch.equal(torch.cat(parts), whole.rows(name, 0, rows)), name


def test_another_dtype_but_for_what_stays_in_fp32(tmp_path: Path) -> None:
    target = LegacyTarget(model("deepseek"), Options(dtype=torch.float16))
    target.make(target.jobs()[0], tmp_path)
    content = load(every_file(tmp_path)[0])
    kinds = {key: value.dtype for key, value in content["model"].items()}
    fp32 = {key for key, kind in kinds.items() if kind == torch.float32}
    assert fp32 == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2, 3)}
    assert set(kinds.values()) == {torch.float32, torch.float16}
    assert content["args"].params_dtype == torch.float16 and content["args"].fp16


def test_what_a_file_of_ours_holds(tmp_path: Path) -> None:
    write(model("qwen3_moe"), tmp_path, tensor=2, pipeline=2, virtual=2, expert=2)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    content = load(tmp_path / "release/mp_rank_01_000_001" / FILE)
    args = content["args"]
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
    assert {"model0", "model1"} <= content.keys() and "model" not in content
    assert (args.tensor_model_parallel_size, args.expert_model_parallel_size) == (2, 2)
    assert (args.virtual_pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage) == (2, 1)
    assert (args.padded_vocab_size, args.vocab_size, args.ckpt_format) == (40, 37, "torch")
    # Second chunk of the first stage is layer 2; experts 2 and 3 of four are 0 and 1 here.
    source, expert = model("qwen3_moe").weights, "model.layers.2.mlp.experts.3."
    gate, up = (source.rows(f"{expert}{kind}_proj.weight", 0, 24) for kind in ("gate", "up"))
    fc1 = content["model1"]["decoder.layers.0.mlp.experts.linear_fc1.weight1"]
    assert torch.equal(fc1, torch.cat((gate[12:], up[12:])))
    down = source.rows(f"{expert}down_proj.weight", 0, 32)
    assert torch.equal(content["model1"]["decoder.layers.0.mlp.experts.linear_fc2.weight1"], down[:, 12:])


# ---- what other versions of Megatron wrote


def test_grouped_experts_of_old(tmp_path: Path) -> None:
    """`weight1` [h, experts x 2f] is really [experts, h, 2f]: transposed, an expert after the other."""
    write(model("mixtral"), tmp_path, tensor=2, expert=2)

    def group(content: dict[str, Any]) -> None:
        tensors = content["model"]
        for layer in range(4):
            at = f"decoder.layers.{layer}.mlp.experts."
            for number in (1, 2):
                each = [tensors.pop(f"{at}linear_fc{number}.weight{expert}").T for expert in range(2)]
                stacked = torch.stack([one.contiguous() for one in each])
                tensors[f"{at}weight{number}"] = stacked.view(32, -1) if number == 1 else stacked.view(-1, 32)

    for path in every_file(tmp_path):
        change(path, group)
    assert same_tensors(read(tmp_path).weights, model("mixtral").weights) == []


def _old_name(name: str) -> str:
    for new, old in (
        ("decoder.layers.", "encoder.layers."),
        ("decoder.final_layernorm", "encoder.final_norm"),
        ("input_layernorm", "input_norm"),
        ("pre_mlp_layernorm", "post_attention_norm"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
    ):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_names_from_before_megatron_core(name: str, tmp_path: Path) -> None:
    write(model(name), tmp_path, "local", tensor=2, pipeline=2)

    def age(content: dict[str, Any]) -> None:
        tree: dict[str, Any] = {}
        outer: dict[str, Any] = {"language_model": tree}
        for key, value in content["model"].items():
            if key == "output_layer.weight" and name == "llama-tied":
                outer["word_embeddings_for_head"] = {"weight": value}
                continue
            first, _, rest = _old_name(key).partition(".")
            inner = tree.setdefault(first, {})
            if first == "embedding":
                inner["word_embeddings"] = {"weight": value}
            else:
                inner[rest] = value
        content["model"] = outer

    for path in every_file(tmp_path):
        change(path, age)
    assert same_tensors(read(tmp_path).weights, model(name).weights) == []
    for path in every_file(tmp_path):
        change(path, lambda content: content.update(checkpoint_version=1.0))
    with pytest.raises(CheckpointError, match="checkpoint_version 1 orders q, k and v"):
        read(tmp_path)


def test_what_is_no_weight_is_left_out_and_said(tmp_path: Path) -> None:
    write(model("llama"), tmp_path)

    def add(content: dict[str, Any]) -> None:
        content["model"] |= {
            "decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(3, dtype=torch.uint8),
            "decoder.layers.0.mlp.linear_fc2._extra_state": None,
            "rotary_pos_emb.inv_freq": torch.zeros(4),
            "mtp.layers.0.eh_proj.weight": torch.zeros(4, 4),
        }
        content["rng_state"] = [{"torch_rng_state": torch.zeros(8, dtype=torch.uint8)}]

    change(every_file(tmp_path)[0], add)
    found = read(tmp_path)
    assert same_tensors(found.weights, model("llama").weights) == []
    skipped = {line.tensor: line.detail for line in lines(found, "skipped")}
    assert skipped.keys() == {"_extra_state", "rotary_pos_emb.inv_freq", "mtp.layers.0.eh_proj.weight"}
    assert skipped["_extra_state"].startswith("2 settings")


def test_experts_that_are_not_cut_while_the_rest_is(tmp_path: Path) -> None:
    """Expert tensor parallel size 1 at tensor parallel size 2: only some pairs of ranks have a file."""
    write(model("mixtral"), tmp_path / "a", tensor=2, expert=2)
    write(model("mixtral"), tmp_path / "b", tensor=1, expert=2, vocab_multiple=8)
    folded = tmp_path / "c/release"
    for tensor, expert in ((0, 0), (1, 1)):
        dense = load(tmp_path / f"a/release/mp_rank_0{tensor}_00{expert}" / FILE)
        whole = load(tmp_path / f"b/release/mp_rank_00_00{expert}" / FILE)
        dense["model"] |= {key: value for key, value in whole["model"].items() if ".experts." in key}
        dense["args"].expert_tensor_parallel_size = 1
        (folded / f"mp_rank_0{tensor}_00{expert}").mkdir(parents=True)
        torch.save(dense, folded / f"mp_rank_0{tensor}_00{expert}" / FILE)
    assert same_tensors(read(tmp_path / "c").weights, model("mixtral").weights) == []
    shutil.rmtree(folded / "mp_rank_01_001")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_000/model_optim_rng.pt: missing"):
        read(tmp_path / "c")


def test_optimizer_states_that_tell_nothing_are_left_out_and_said(tmp_path: Path) -> None:
    write(model("llama"), tmp_path, tensor=2)
    assert lines(read(tmp_path), "skipped") == []
    for path in every_file(tmp_path):
        change(
            path, lambda content: content.update(optimizer={"optimizer": {"state": {}, "param_groups": []}})
        )
    (line,) = lines(read(tmp_path), "skipped")
    assert line.tensor == "optimizer" and "its 0 states are not those of its 27 weights" in line.detail
    assert lines(read(tmp_path, optimizer=False), "skipped") == []
    flat = every_file(tmp_path)[0].parent / "distrib_optim.pt"
    flat.touch()
    with pytest.raises(CheckpointError, match=r"mp_rank_00/distrib_optim.pt: is no file of torch.save"):
        read(tmp_path)
    torch.save({"buckets_coalesced": True}, flat)
    (line,) = lines(read(tmp_path), "skipped")
    assert "its 0 buffers are not those of its weights" in line.detail and "torch_dist" in line.detail


# ---- steps


def test_steps(tmp_path: Path) -> None:
    for step in (5, 12):
        write(model("llama"), tmp_path)
        (tmp_path / "release").rename(tmp_path / f"iter_{step:07d}")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("5")
    assert read(tmp_path).step == 5
    assert read(tmp_path, step=12).step == 12
    assert read(tmp_path / "iter_0000012").step == 12
    tracker.unlink()
    assert read(tmp_path).step == 12
    with pytest.raises(CheckpointError, match=r"has no step 7; there is iter_0000005, iter_0000012"):
        read(tmp_path, step=7)
    tracker.write_text("../x")
    with pytest.raises(CheckpointError, match=r"holds '../x', not a step"):
        read(tmp_path)
    tracker.write_text("release")
    with pytest.raises(CheckpointError, match=r"has no release"):
        read(tmp_path)


def test_tokenizer_travels(tmp_path: Path) -> None:
    extras = tmp_path / "hf"
    extras.mkdir()
    (extras / "tokenizer.json").write_text("{}")
    write(replace(model("llama"), extras=extras), tmp_path / "x")
    found = read(tmp_path / "x").extras
    assert (found / "tokenizer.json").read_text() == "{}"


def test_states_that_have_no_place_are_left_out_and_said() -> None:
    source = model("llama").weights
    both = {"exp_avg": source, "exp_avg_sq": source}
    assert FORMAT.takes is not None
    for slots, step, dtype, why in (
        ({"exp_avg": source}, 3, None, "the source lacks exp_avg_sq of some weights"),
        (both | {"master": Tensors({})}, 3, None, "the source lacks master of some weights"),
        (both, None, None, "the source does not say after which step they are"),
        (both, 3, torch.float32, "a run in fp32 has no masters beside its weights"),
    ):
        full = replace(model("llama"), optimizer=slots, step=step)
        left = FORMAT.takes(full, Options(dtype=dtype))
        assert (left.optimizer, left.step, left.weights) == ({}, None, full.weights)
        assert [line.tensor for line in left.report if why in line.detail] == ["optimizer states"]
    assert FORMAT.takes(replace(full, optimizer=both), Options()).optimizer == both
    assert FORMAT.takes(replace(model("llama"), step=3), Options()).step is None


def test_other_folders_are_not_detected(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_model_states.pt").touch()  # DeepSpeed's
    (tmp_path / "iter_0000001").mkdir()
    assert not FORMAT.detect(tmp_path)
    assert not FORMAT.detect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no iter_"):
        FORMAT.open(tmp_path, Options())


# ---- what is refused


def _without(tensor: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        change(every_file(folder)[-1], lambda content: content["model"].pop(tensor))

    return spoil


def _with(tensor: str, value: Tensor) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        change(every_file(folder)[-1], lambda content: content["model"].update({tensor: value}))

    return spoil


def _args(which: int, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        change(every_file(folder)[which], lambda content: vars(content["args"]).update(values))

    return spoil


def _content(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        change(every_file(folder)[0], lambda content: content.update(values))

    return spoil


def _no_rank(folder: Path) -> None:
    shutil.rmtree(folder / "release/mp_rank_01_000")


def _cut_off(folder: Path) -> None:
    path = every_file(folder)[-1]
    path.write_bytes(path.read_bytes()[:-2000])


def _another_rank(folder: Path) -> None:
    shutil.copytree(folder / "release/mp_rank_01_000", folder / "release/mp_rank_02_000")


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _no_rank,
            r"mp_rank_01_000/model_optim_rng.pt: missing, though .* tensor parallel size 2, pipeline 2",
        ),
        (_another_rank, r"mp_rank_02_000: is of tensor parallel rank 2, but .* tensor parallel size is 2"),
        (_args(-1, tensor_model_parallel_size=4), r"mp_rank_01_001/.*: was saved under another layout"),
        (_args(0, pipeline_model_parallel_size=1), r"name has 2 numbers, but the arguments"),
        (_args(0, tensor_model_parallel_size="2"), r"args.tensor_model_parallel_size is '2', not a size"),
        (_args(0, apply_layernorm_1p=True), r"args.apply_layernorm_1p is True, but norms of llama models"),
        (_without(QKV), rf"mp_rank_01_001/.*: has no {QKV} \(decoder.layers.2.self_attention"),
        (
            _with(QKV, torch.zeros(3, 32)),
            r"decoder.layers.2.self_attention.linear_qkv.weight has shape \[3, 32\]",
        ),
        (
            _with("decoder.layers.0.x", torch.zeros(3)),
            r"decoder.layers.0.x has no counterpart in a llama model",
        ),
        (_with("decoder.layers.9.x", torch.zeros(3)), r"has layers up to 9 but not layer 2|no counterpart"),
        (
            _with("output_layer.weight", torch.zeros(8, 32)),
            r"output_layer.weight has shape|16 rows for a vocab",
        ),
        (_content(args=None), r"has no `args`"),
        (_content(model=None), r"has no `model`"),
        (_content(model={"a": 3}), r"a is no tensor but a int"),
        (_cut_off, r"mp_rank_01_001"),
    ],
)
def test_damaged_or_mixed_files(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(model("llama"), tmp_path, tensor=2, pipeline=2)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_copy_of_the_embedding_that_is_none(tmp_path: Path) -> None:
    write(model("llama-tied"), tmp_path, pipeline=2)
    change(every_file(tmp_path)[1], lambda content: content["model"]["output_layer.weight"][7].add_(1.0))
    with pytest.raises(CheckpointError, match="output_layer.weight is not the embedding, though"):
        read(tmp_path)


def test_replicas_that_differ_are_told(tmp_path: Path) -> None:
    write(model("llama"), tmp_path, tensor=2)
    norm = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    change(every_file(tmp_path)[1], lambda content: content["model"][norm].add_(1.0))
    (line,) = lines(read(tmp_path), "mapped")
    assert line.tensor == norm and "mp_rank_00's" in line.detail


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("llama", {"tensor": 3}, "--tensor 3: does not divide the model's 8 attention heads"),
        ("mixtral", {"tensor": 16}, "--tensor 16: does not divide"),
        ("llama", {"pipeline": 3}, "--pipeline 3 with --virtual 1: 4 layers are no multiple of 3"),
        ("llama", {"pipeline": 2, "virtual": 4}, "--pipeline 2 with --virtual 4: 4 layers"),
        ("llama", {"virtual": 2}, "--virtual 2: needs --pipeline 2"),
        ("llama", {"expert": 2}, "--expert 2: does not divide the model's 0 experts"),
        ("mixtral", {"expert": 3}, "--expert 3: does not divide the model's 4 experts"),
    ],
)
def test_layouts_that_do_not_divide(name: str, layout: dict[str, int], message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        LegacyTarget(model(name), Options(**layout))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "biases on attention but not on all linear layers"),
        ({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}, "norms only after its blocks"),
    ],
)
def test_models_that_megatron_has_not(changes: dict[str, Any], message: str) -> None:
    config = model("llama").hf_config | changes
    table_of = model("llama").weights
    if "attention_bias" in changes:
        spec = spec_of(config)
        table = MegatronTable(spec)
        table_of = Tensors({name: torch.zeros(table.hf_shape(name)) for name in table.hf_names})
    with pytest.raises(ConfigError, match=message):
        LegacyTarget(replace(model("llama"), hf_config=config, weights=table_of), Options())


@pytest.mark.parametrize("spoil", ["extra", "missing", "shape"])
def test_weights_that_are_not_the_configs(spoil: str) -> None:
    source = model("llama")
    tensors = {
        name: source.weights.rows(name, 0, source.weights.shape(name)[0]) for name in source.weights.names()
    }
    if spoil == "extra":
        tensors["model.layers.0.x.weight"] = torch.zeros(2)
    elif spoil == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.weight"] = torch.zeros(3)
    messages = {
        "extra": "x.weight has no place",
        "missing": "norm.weight is missing",
        "shape": r"has shape \[3\]",
    }
    with pytest.raises(MegatuneError, match=messages[spoil]):
        LegacyTarget(replace(source, weights=Tensors(tensors)), Options())


def test_nothing_of_a_file_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write(model("llama"), tmp_path / "x")
    path = every_file(tmp_path / "x")[0]
    content = load(path)
    content["args"].stop_signal = signal.SIGTERM  # what real files hold: members of enumerations
    torch.save(content, path)
    assert same_tensors(read(tmp_path / "x").weights, model("llama").weights) == []
    content["args"].bomb = Bomb()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="may be an attack"):
        read(tmp_path / "x")
    assert not (tmp_path / "ran").exists()
