"""GGUF files: every supported architecture and tensor type, and files that cannot be used.

The files are written here from transformers' models as llama.cpp's converter writes them: rows of Llama's q and k
interleaved, 1 added to Gemma's norm weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatune.checkpoint import load_pretrained, resolve_model
from megatune.errors import CheckpointError
from megatune.models import build, whole_weights
from tests.helpers.families import LLAMA3, YARN, documents
from tests.helpers.tiny import CHATML, make_tokenizer

Type = gguf.GGMLQuantizationType
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
GLOBAL, LOCAL = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-biases": ("llama", "Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama3.1": ("llama", "Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "linear": (
        "llama",
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}},
    ),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}),
    "wide": ("qwen3", "Qwen3", {"head_dim": 32, "intermediate_size": 256}),
    "yarn": ("qwen3", "Qwen3", {"rope_parameters": YARN}),
    "gemma2": ("gemma2", "Gemma2", GEMMA),
    "gemma3": (
        "gemma3",
        "Gemma3",
        GEMMA
        | {"num_hidden_layers": 7, "rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": 7}),
    "phi3-long": ("phi3", "Phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def make_hf(name: str):
    """transformers' model of a case, with random weights."""
    import transformers

    _, prefix, extra = CASES[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(
        config_class(**(SIZES | extra)), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.12 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model.eval()


def write_gguf(
    path: Path,
    hf: Any,
    architecture: str,
    types: dict[str, Type] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    blocks: dict[str, tuple[np.ndarray, Type] | None] | None = None,
) -> dict[str, np.ndarray]:
    """Write a transformers model as llama.cpp does; `types`: of tensors by their GGUF names, else F32; `extra`: more
    tensors; `blocks`: raw data in place of
    tensors, None to leave one out. Returns what the tensors hold, by Hugging Face name."""
    config = hf.config
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, config, architecture)
    _write_tokens(writer, path.parent)
    held = {}
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target, values = _gguf_name(name, architecture), tensor.float().numpy()
        if target in (blocks or {}):
            if blocks[target] is not None:
                writer.add_tensor(target, blocks[target][0], raw_dtype=blocks[target][1])
            continue
        if architecture == "llama" and ".q_proj." in name:
            values = _interleave(values, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj." in name:
            values = _interleave(values, config.num_key_value_heads)
        elif architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        kind = (types or {}).get(target, Type.F32)
        data = values if kind == Type.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(target, np.ascontiguousarray(data), raw_dtype=kind)
        held[name] = gguf.quants.dequantize(data, kind)
    _write_rope(writer, config)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _gguf_name(name: str, architecture: str) -> str:
    leaf, kind = name.rsplit(".", 1)
    names = NAMES | (GEMMA_NORMS if architecture.startswith("gemma") else {})
    if not leaf.startswith("model.layers."):
        return f"{names[leaf]}.{kind}"
    _, _, index, leaf = leaf.split(".", 3)
    return f"blk.{index}.{names[leaf]}.{kind}"


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head next to row i of its second half."""
    rows = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.stack([rows[:, 0], rows[:, 1]], 2).reshape(values.shape)


def _write_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if architecture != "qwen2" and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def _write_tokens(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = make_tokenizer(folder / "tokens")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    state = json.loads((folder / "tokens/tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    hf = make_hf(name)
    write_gguf(tmp_path / "model.gguf", hf, CASES[name][0])
    source = resolve_model(str(tmp_path / "model.gguf"), str(tmp_path / "cache"))
    ours = build(source.spec)
    load_pretrained(whole_weights(ours.to_empty(device="cpu")), source.spec, source)
    tokens, segments, _ = documents((33,), 320)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, segments), hf(tokens[None]).logits[0], rtol=1e-5, atol=2e-5)


QUANTISED = [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_tensor_type(kind: Type, tmp_path: Path) -> None:
    hf = make_hf("qwen3")
    held = write_gguf(tmp_path / "model.gguf", hf, "qwen3", {"blk.1.ffn_down.weight": kind})
    source = resolve_model(str(tmp_path / "model.gguf"), str(tmp_path / "cache")).tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    rows = source.rows(name, 0, 64)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.from_numpy(held[name]))
    error = (rows - hf.state_dict()[name]).abs().max()
    assert 0 < error < 0.05


def _q6_k(block: np.ndarray) -> np.ndarray:
    """The 256 values of a block, from the format's definition."""
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    factor = float(block[208:210].view(np.float16)[0])
    values = np.zeros(256, np.float32)
    for half in range(2):
        for i in range(32):
            for quarter in range(4):
                nibble = low[64 * half + 32 * (quarter % 2) + i] >> (4 * (quarter // 2)) & 15
                quant = int(nibble) | (int(high[32 * half + i]) >> (2 * quarter) & 3) << 4
                scale = int(scales[8 * half + 2 * quarter + i // 16])
                values[128 * half + 32 * quarter + i] = factor * scale * (quant - 32)
    return values


def _q45_k(block: np.ndarray, bits: int) -> np.ndarray:
    """The 256 values of a Q4_K or Q5_K block, from the formats' definition."""
    factor, minimum = block[:4].view(np.float16).astype(float)
    packed, high, low = block[4:16].astype(int), block[16:-128].astype(int), block[-128:].astype(int)
    values = np.zeros(256, np.float32)
    for part in range(8):
        if part < 4:
            scale, offset = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            offset = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        for i in range(32):
            quant = low[32 * (part // 2) + i] >> 4 * (part % 2) & 15
            if bits == 5:
                quant |= (high[i] >> part & 1) << 4
            values[32 * part + i] = factor * scale * quant - minimum * offset
    return values


K_QUANTS = {Type.Q6_K: _q6_k, Type.Q4_K: lambda b: _q45_k(b, 4), Type.Q5_K: lambda b: _q45_k(b, 5)}


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants(kind: Type, tmp_path: Path) -> None:
    """The gguf package cannot write these: random blocks with sane factors."""
    blocks = np.random.default_rng(0).integers(0, 256, (64, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    if kind == Type.Q6_K:
        blocks[:, 208:210] = np.array([0.01], np.float16).view(np.uint8)
    else:
        blocks[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    hf = make_hf("wide")
    write_gguf(tmp_path / "x.gguf", hf, "qwen3", blocks={"blk.0.ffn_down.weight": (blocks, kind)})
    source = resolve_model(str(tmp_path / "x.gguf"), str(tmp_path / "cache")).tensors()
    found = source.rows("model.layers.0.mlp.down_proj.weight", 0, 64).numpy()
    np.testing.assert_allclose(
        found, np.stack([K_QUANTS[kind](block) for block in blocks]), rtol=1e-5, atol=1e-6
    )


def test_the_folder_is_whole_and_made_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", make_hf("llama"), "llama")
    first = resolve_model(str(tmp_path / "model.gguf"), str(tmp_path / "cache"))
    names = {file.name for file in first.path.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = resolve_model(str(tmp_path / "model.gguf"), str(tmp_path / "cache"))
    assert again == first and (again.path / "model.safetensors").stat().st_mtime_ns == stamp
    rebuilt = AutoTokenizer.from_pretrained(first.path)
    text = "Where is the owl?<|im_end|>\n"
    original = Tokenizer.from_file(str(tmp_path / "tokens/tokenizer.json"))
    assert rebuilt(text).input_ids == original.encode(text).ids
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id, rebuilt.pad_token_id) == (1, 2, 2)
    rendered = rebuilt.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"


def _bad(path: Path, architecture: str = "llama", parts: int = 1, **tensors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint16("split.count", parts)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EMBED = {"token_embd.weight": np.zeros((4, 4), np.float32)}


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            resolve_model(str(path), str(tmp_path / "cache"))
        assert not list((tmp_path / "cache/models").glob("[!.]*"))
        return str(caught.value)

    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUFnothing")
    assert "x.gguf: not a GGUF file, or truncated" in message(path)
    assert "'mamba' is not supported; supported are llama, qwen2" in message(_bad(path, "mamba", **EMBED))
    assert "is one of 3 parts; join them first" in message(_bad(path, parts=3, **EMBED))
    assert "has no tensor token_embd.weight" in message(_bad(path, x=np.zeros(3, np.float32)))
    assert "its metadata has no attention.head_count" in message(_bad(path, **EMBED))
    write_gguf(path, make_hf("llama"), "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "not a GGUF file, or truncated" in message(path)


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    path, cache = tmp_path / "x.gguf", str(tmp_path / "cache")
    write_gguf(
        path, make_hf("llama"), "llama", extra={"blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32)}
    )
    with pytest.raises(
        CheckpointError, match="tensor blk.0.ffn_gate_inp.weight is not known for architecture llama"
    ):
        resolve_model(str(path), cache)
    write_gguf(path, make_hf("llama"), "llama", extra={"output.bias": np.zeros(320, np.int32)})
    with pytest.raises(CheckpointError, match="tensor output.bias has type I32, which cannot be read"):
        resolve_model(str(path), cache)
    write_gguf(path, make_hf("llama"), "llama", blocks={"blk.1.ffn_up.weight": None})
    with pytest.raises(
        CheckpointError, match="1 tensors are missing, the first is model.layers.1.mlp.up_proj.weight"
    ):
        resolve_model(str(path), cache)
    wrong = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    write_gguf(path, make_hf("llama"), "llama", extra=wrong)
    with pytest.raises(CheckpointError, match="not those of Llama 3.1's scaling"):
        resolve_model(str(path), cache)
    assert not list((tmp_path / "cache/models").glob("[!.]*"))
