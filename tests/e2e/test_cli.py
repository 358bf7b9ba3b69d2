"""The verbs of the command line as a user sees them."""

import json

import pytest
import torch
from click.testing import CliRunner

from megatune import cli
from megatune.config.loader import dump_config
from tests.helpers.runs import LORA, losses, metrics, tensors, tiny_config


def invoke(*words: str, text: str | None = None):
    result = CliRunner().invoke(cli.commands, list(words), input=text)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def config_file(tiny_llama, tiny_data, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(tiny_llama, tiny_data, tmp_path / "run", method=LORA)))
    return path


@pytest.fixture(scope="module")
def tuned(tiny_llama, tiny_data, tmp_path_factory):
    import megatune

    folder = tmp_path_factory.mktemp("tuned")
    megatune.train(
        tiny_config(tiny_llama, tiny_data, folder, method=LORA, train__samples=2, train__sample_tokens=8)
    )
    return folder


def test_dry_run_prints_the_plan_and_starts_nothing(config_file, tmp_path):
    output = invoke("train", str(config_file), "--dry-run", "train.global_batch_size=8", "--nproc", "2")
    for part in (
        "trainable",
        "tokens per step",
        "768",
        "2 x cpu",
        "memory: total",
        "GiB",
        "global_batch_size: 8",
    ):
        assert part in output, part
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_are_the_models(config_file, tiny_llama):
    output = invoke("train", str(config_file), "--dry-run")
    total = sum(t.numel() for t in tensors(tiny_llama).values())
    adapters = 2 * (4 * 3 * 64 + 128 * 4 + 4 * 64 + 64 * 4 + 2 * 4 * 64 + 256 * 4 + 4 * 128 + 64 * 4)
    assert f"{total + adapters:,} parameters" in output
    assert f"{adapters:,} (" in output


def test_data_show_marks_what_is_trained(config_file):
    output = invoke("data", "show", str(config_file), "-n", "2")
    assert "Where is the cat?" in output
    assert "The cat" in output


def test_env_names_versions_and_bodies():
    output = invoke("env")
    assert torch.__version__ in output
    for op in ("attention", "rms_norm", "rope", "glu", "linear_cross_entropy"):
        assert op in output


@pytest.mark.parametrize("which", ["merged", "adapter"])
def test_generate_answers_the_same_from_adapter_and_merged(tuned, which):
    words = ("--prompt", "Where is the owl?", "--max-new-tokens", "6", "--dtype", "fp32")
    assert invoke("generate", str(tuned / which), *words) == invoke("generate", str(tuned / "merged"), *words)


def test_generate_equals_transformers(tuned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned / "merged")
    model = AutoModelForCausalLM.from_pretrained(tuned / "merged", dtype=torch.float32)
    messages = [{"role": "user", "content": "Where is the owl?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    words = ("--prompt", "Where is the owl?", "--max-new-tokens", "6", "--dtype", "fp32")
    assert invoke("generate", str(tuned / "merged"), *words).strip() == expected.strip()


def test_generate_raw_continues_text_from_standard_input(tuned):
    output = invoke(
        "generate", str(tuned / "merged"), "--raw", "--max-new-tokens", "4", "--dtype", "fp32", text="The cat"
    )
    assert output.strip()


def test_chat_keeps_the_conversation_until_an_empty_line(tuned, monkeypatch):
    from megatune.serve import chat

    seen = []
    plain = chat._chat_ids

    def spy(tokenizer, messages):
        seen.append([message["role"] for message in messages])
        return plain(tokenizer, messages)

    monkeypatch.setattr(chat, "_chat_ids", spy)
    words = ("--max-new-tokens", "3", "--temperature", "0", "--dtype", "fp32", "--system", "Be brief.")
    invoke("chat", str(tuned / "merged"), *words, text="Where is the cat?\nAre you sure?\n\n")
    assert seen == [["system", "user"], ["system", "user", "assistant", "user"]]


def test_samples_before_and_after_are_kept(tuned):
    samples = json.loads((tuned / "samples.json").read_text())
    assert len(samples["before"]) == len(samples["after"]) == 2
    assert samples["before"][0]["prompt"] == samples["after"][0]["prompt"]
    assert samples["after"][0]["reference"]


def test_a_run_leaves_what_the_readme_lists(tuned):
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "logs/rank-00000.log", "summary.json"):
        assert (tuned / name).stat().st_size > 0, name
    assert (tuned / "adapter" / "adapter_model.safetensors").exists()
    assert (tuned / "merged" / "model.safetensors").exists()
    row = next(row for row in metrics(tuned) if "loss" in row)
    wanted = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second_per_gpu", "mfu", "memory_gib"}
    assert row.keys() == wanted | {"step_seconds"}
    assert any(row.keys() == {"step", "eval_loss"} for row in metrics(tuned))


def test_freeze_changes_only_what_was_chosen(tiny_llama, tiny_data, tmp_path):
    import megatune

    method = {"type": "freeze", "last_layers": 1, "modules": ["norm.weight"]}
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path, method=method))
    before, after = tensors(tiny_llama), tensors(tmp_path / "model")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {
        name for name in before if name.startswith("model.layers.1.") or name == "model.norm.weight"
    }


def test_early_stop_ends_the_run_and_it_counts_as_done(tiny_llama, tiny_data, tmp_path):
    config = tiny_config(
        tiny_llama,
        tiny_data,
        tmp_path / "run",
        train__steps=20,
        train__eval_every=1,
        optim__lr=1e-9,
        optim__clip=1e-6,
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    rule = "train.early_stop={patience: 2, min_delta: 0.5}"
    assert "stopped early" in invoke("train", str(path), rule)
    assert len(losses(tmp_path / "run")) == 3
    assert "is done" in invoke("train", str(path), rule)
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed before its exports
    invoke("train", str(path), rule)
    assert len(losses(tmp_path / "run")) == 3


def test_epochs_decide_the_number_of_steps(tiny_llama, tiny_data, tmp_path):
    import megatune

    result = megatune.train(
        tiny_config(
            tiny_llama, tiny_data, tmp_path, train__steps=None, train__epochs=0.5, train__global_batch_size=4
        )
    )
    assert result.step == 5  # 40 packed sequences


def test_bf16_on_the_cpu_follows_fp32(tiny_llama, tiny_data, tmp_path):
    import megatune

    for dtype in ("fp32", "bf16"):
        config = tiny_config(
            tiny_llama, tiny_data, tmp_path / dtype, model__dtype=dtype, optim__lr=5e-3, train__steps=6
        )
        megatune.train(config)
    expected = losses(tmp_path / "fp32")
    assert expected[-1] < expected[0] - 0.5
    assert losses(tmp_path / "bf16") == pytest.approx(expected, rel=2e-2)
