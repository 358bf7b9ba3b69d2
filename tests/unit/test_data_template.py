"""Chat templates: what is rendered, which tokens are learnt, and templates that misbehave."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megatune.data import ChatTemplate, Tokenizer, encode_chat, encode_prompt, load_template, load_tokenizer
from megatune.data.formats import RowError
from megatune.errors import ConfigError
from tests.helpers.datasets import SMOLLM2_TEMPLATE, tokenizer_folder, tokenizer_with

ONE = [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "In the barn."}]
TWO = [*ONE, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]

# As Qwen3's: thoughts are kept in the last turn only, so that earlier turns change when others follow.
DROPS_THOUGHTS = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As the distilled DeepSeek models': the answer's opening has a thought in it that a written answer has not.
OPENS_A_THOUGHT = SMOLLM2_TEMPLATE.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("smol")))


def learnt(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """Decoded runs of learnt tokens."""
    runs: list[list[int]] = []
    before = False
    for token, flag in zip(ids, mask, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, "test", {"bos_token": "<s>", "eos_token": "</s>"})


def test_smollm2_learns_the_answer_and_the_end_of_turn(smol: Tokenizer) -> None:
    ids, mask = encode_chat(ONE, smol)
    assert smol.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhere is the cat?<|im_end|>\n<|im_start|>assistant\nIn the barn.<|im_end|>\n"
    )
    assert learnt(smol, ids, mask) == ["In the barn.<|im_end|>"]
    # The line break after the end of the turn is the template's; the token before the answer is the prompt's.
    assert not mask[-1] and ids[-2] == smol.eos_id and mask[-2]
    assert ids[: mask.index(True)] == encode_prompt(ONE[:1], smol)


def test_each_turn_the_last_turn_all(smol: Tokenizer) -> None:
    assert learnt(smol, *encode_chat(TWO, smol)) == ["In the barn.<|im_end|>", "Yes.<|im_end|>"]
    assert learnt(smol, *encode_chat(TWO, smol, "last")) == ["Yes.<|im_end|>"]
    ids, mask = encode_chat(TWO, smol, "all")
    assert all(mask) and len(mask) == len(ids)


def test_weights_take_turns_out(smol: Tokenizer) -> None:
    messages = [{**message, "weight": int(i == 1)} for i, message in enumerate(TWO)]
    assert learnt(smol, *encode_chat(messages, smol)) == ["In the barn.<|im_end|>"]
    ids, mask = encode_chat([{**message, "weight": 0} for message in ONE], smol)
    assert ids and not any(mask)


def test_what_follows_the_last_answer_is_left_out(smol: Tokenizer) -> None:
    assert encode_chat([*ONE, {"role": "user", "content": "And the dog?"}], smol) == encode_chat(ONE, smol)


def test_markers_and_differences_agree(smol: Tokenizer) -> None:
    plain = compiled(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    marked = compiled(MARKED)
    assert marked.marked and not plain.marked
    for train_on in ("assistant", "last", "all"):
        assert encode_chat(TWO, smol, train_on, marked) == encode_chat(TWO, smol, train_on, plain)
    weighted = [{**message, "weight": 0} if i == 3 else message for i, message in enumerate(TWO)]
    assert learnt(smol, *encode_chat(weighted, smol, "assistant", marked)) == ["In the barn.<|im_end|>"]


def test_marks_leave_no_trace_in_the_text() -> None:
    text = compiled(MARKED).render(ONE, prompt=True)
    assert text == (
        "<|im_start|>user\nWhere is the cat?<|im_end|>\n<|im_start|>assistant\nIn the barn.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    captured = compiled(
        "{% set x %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}<{{ x }}>"
    )
    assert captured.render_marked(ONE, tools=None) == ("<Where is the cat?>", [(1, 18)])


def test_single_turns_need_a_mark_each(smol: Tokenizer) -> None:
    double = compiled(
        MARKED.replace("{% endgeneration %}", "{% endgeneration %}{% generation %}!{% endgeneration %}")
    )
    assert (
        len(learnt(smol, *encode_chat(TWO, smol, "assistant", double))) == 2
    )  # neighbours, so one run a turn
    with pytest.raises(RowError, match=r"marks 4 stretches for 2 assistant turns"):
        encode_chat(TWO, smol, "last", double)


def test_a_template_that_rewrites_the_past_is_refused(smol: Tokenizer) -> None:
    template = compiled(DROPS_THOUGHTS)
    assert learnt(smol, *encode_chat(ONE, smol, "assistant", template)) == [
        "<think>\n\n</think>\n\nIn the barn.<|im_end|>"
    ]
    with pytest.raises(
        RowError, match=r"message 2 in another way once others follow it.*data.train_on: last"
    ) as error:
        encode_chat(TWO, smol, "assistant", template)
    assert "generation" in str(error.value) and error.value.kind == "template_prefix"
    assert learnt(smol, *encode_chat(TWO, smol, "last", template)) == [
        "<think>\n\n</think>\n\nYes.<|im_end|>"
    ]


def test_a_template_whose_opening_is_not_in_the_answer_is_refused(smol: Tokenizer) -> None:
    with pytest.raises(
        RowError, match=r"opens the answer of message 2 with text that is not.*set data.chat_template"
    ):
        encode_chat(ONE, smol, "assistant", compiled(OPENS_A_THOUGHT))


def test_a_template_without_an_opening(smol: Tokenizer) -> None:
    # As Mistral's: the answer follows [/INST] directly, with a space of its own.
    template = compiled(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    assert learnt(smol, *encode_chat(TWO, smol, "assistant", template)) == [
        " In the barn.<|im_end|>",
        " Yes.<|im_end|>",
    ]


def test_white_space_stays_where_nothing_else_ends_the_turn(smol: Tokenizer) -> None:
    template = compiled(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert learnt(smol, *encode_chat(ONE, smol, "assistant", template)) == ["In the barn.\n"]


def test_a_token_that_begins_in_the_prompt_is_not_learnt(tmp_path: Path) -> None:
    import tokenizers

    # Every character but "x" is a token; runs of x are one: the prompt ends with one x, the answer begins with one.
    vocabulary = {"[UNK]": 0, "x": 1, "xx": 2, "a": 3, "b": 4, "<e>": 5}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("x", "x")], unk_token="[UNK]"))
    fast.add_special_tokens(["<e>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    template = compiled(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}x{% else %}{{ m.content }}<e>{% endif %}"
        "{% endfor %}"
    )
    ids, mask = encode_chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xb"}],
        tokenizer,
        "assistant",
        template,
    )
    assert ids == [3, 2, 4, 5]
    assert mask == [False, False, True, True]


def test_tools_and_tool_calls_reach_the_template() -> None:
    template = compiled("{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls or [] %}"
                        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}")  # fmt: skip
    messages = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é<"}}}],
        }
    ]
    assert template.render(messages, tools=[{"name": "f"}]) == '[{"name": "f"}]{"a": "é<"}'


def test_what_transformers_gives_templates() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{{ m['content'] | trim }}\n{% endfor %}{{ strftime_now('%Y') }}"
    )
    template = ChatTemplate(source, "t", {"bos_token": "<s>"}, datetime(2020, 1, 2))
    assert template.render(ONE) == "<s>Where is the cat?\n2020"


def test_equal_to_transformers(smol: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(smol.folder / "tokenizer.json"))
    for template in (SMOLLM2_TEMPLATE, DROPS_THOUGHTS, MARKED):
        ours = compiled(template)
        for messages in (ONE, TWO):
            for prompt in (False, True):
                expected = theirs.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                assert ours.render(messages, prompt=prompt) == expected
    expected = theirs.apply_chat_template(
        TWO, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encode_chat(TWO, smol, "assistant", compiled(MARKED))
    assert expected["input_ids"] == ids
    assert [bool(flag) for flag in expected["assistant_masks"]] == mask


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only two turns\nplease') }}", "refuses the row: only two turns please"),
        ("{{ messages[7].content.x }}", "refuses the row: .*has no (element 7|attribute 'content')"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "ranges of more than"),
        ("{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}", "ranges of more than"),
        ("{{ 'ab' * 10 ** 9 }}", "makes a value of 2000000000 items"),
        ("{{ 9 ** 9 ** 9 ** 9 ** 9 }}", "a number is too large"),
        ("{% set ns = namespace(t=9) %}{% for i in range(99) %}{% set ns.t = ns.t * ns.t %}{% endfor %}", "number"),
        ("{{ '%1000000000d' % 1 }}", "too large"),
        ("{% set ns = namespace(t='x') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}", "value"),
        ("{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}", "text is longer than"),
    ],
)  # fmt: skip
def test_templates_that_raise_or_run_wild(source: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as raised:
        compiled(source).render(ONE)
    assert raised.value.kind == "template"
    assert "\n" not in str(raised.value)


def test_a_syntax_error_names_the_line() -> None:
    with pytest.raises(ConfigError, match=r"chat template test, line 2: .*data.chat_template"):
        compiled("{% if true %}\n{% endfor %}")


def test_no_template_says_what_to_set(smol: Tokenizer, tmp_path: Path) -> None:
    bare = tokenizer_with(smol, tmp_path / "bare", None)
    with pytest.raises(ConfigError, match="has no chat template: set data.chat_template"):
        encode_chat(ONE, bare)
    (tmp_path / "own.jinja").write_text(MARKED)
    template = load_template(bare, tmp_path / "own.jinja")
    assert learnt(bare, *encode_chat(ONE, bare, "assistant", template)) == ["In the barn.<|im_end|>"]
    with pytest.raises(ConfigError, match=r"nowhere\.jinja cannot be read"):
        load_template(bare, tmp_path / "nowhere.jinja")


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": MARKED}]},
        {"chat_template": MARKED},
    ],
)
def test_where_templates_stand(smol: Tokenizer, tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(smol, tmp_path / "t", settings["chat_template"])
    assert tokenizer.chat_template == MARKED
    (tmp_path / "t" / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(tmp_path / "t").chat_template == "own file"


def test_no_assistant_turn(smol: Tokenizer) -> None:
    with pytest.raises(RowError, match="no assistant turn"):
        encode_chat(ONE[:1], smol)
