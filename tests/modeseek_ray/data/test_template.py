"""Chat templates and masks against transformers' own `apply_chat_template`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeseek_ray.data.rows import Chat
from modeseek_ray.data.template import ChatTemplate
from modeseek_ray.data.tokenizer import ChatTokenizer
from modeseek_ray.errors import DataError, ModelError
from tests.modeseek_ray.data.chat_models import CHATML, TEMPLATES, without_generation_blocks, write_model

CONTENT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20) | st.sampled_from(
    [
        " padded ",
        "two\nlines\n",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</think>",
        "é…漢字🎉",
        " ",
        "\ue000",
        "\ue001",
    ]
)


@st.composite
def conversations(draw: Any) -> list[dict[str, str]]:
    turns = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    roles = ("user", "assistant")
    return [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTokenizer, ChatTokenizer, Any]]:
    """For each template: ours without and with generation blocks, and transformers' with them."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("templates")
    pairs = {}
    for name, template in TEMPLATES.items():
        marked = write_model(directory / f"{name}-marked", template)
        plain = write_model(directory / name, without_generation_blocks(template))
        pairs[name] = (ChatTokenizer(plain), ChatTokenizer(marked), AutoTokenizer.from_pretrained(marked))
    return pairs


def reference_of(theirs: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [bool(m) for m in out["assistant_masks"]]
    trained[0] = False  # nothing predicts the first token
    return list(out["input_ids"]), trained


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=60)
@given(messages=conversations())
@example(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
@example(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "<"}])
def test_tokens_and_masks_are_those_of_transformers(pairs, name, messages):
    plain, marked, theirs = pairs[name]
    ids, trained = reference_of(theirs, messages)
    chat = Chat(messages, [True] * (len(messages) // 2))
    (by_blocks,) = marked.encode([chat])
    assert (by_blocks.token_ids_T.tolist(), by_blocks.trained_T.tolist()) == (ids, trained)
    (by_search,) = plain.encode([chat])
    if isinstance(by_search, DataError):  # refused rather than masked wrongly
        assert by_search.code == "refused_by_template"
        return
    assert by_search.token_ids_T.tolist() == ids
    if name != "trimming" or messages_are_trimmed(messages):
        assert by_search.trained_T.tolist() == trained


def messages_are_trimmed(messages: list[dict[str, str]]) -> bool:
    return all(m["content"] == m["content"].strip() and m["content"] for m in messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(pairs, name):
    plain, _, theirs = pairs[name]
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}] * 2
    for prompt in (False, True):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert plain.render(messages, add_generation_prompt=prompt) == expected
    ids = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert plain.encode_prompt(messages[:1]).tolist() == list(ids)


def test_filters_and_globals_are_those_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    template = (
        "{{ tools | tojson(indent=2) }}{{ messages | tojson }}{{ strftime_now('%Y') }}{{ eos_token }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}\n"
        "  {% set ns = namespace(x=1) %}\n{{ ns.x }}"
    )
    model = write_model(tmp_path, template)
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "not seen"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "<&>"}}]
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(messages, tools=tools, tokenize=False)
    assert ChatTokenizer(model).render(messages, tools=tools) == expected


def spans(source: str, *contents: str, roles: str = "ua") -> list[str]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": names[r], "content": c} for r, c in zip(roles, contents, strict=True)]
    template = ChatTemplate(source, ["<|im_end|>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"})
    text, found = template.locate(messages)
    return [text[start:end] for start, end in found]


def test_the_end_of_turn_token_is_trained_and_the_line_break_after_it_is_not():
    assert spans(without_generation_blocks(CHATML), "hi", "yes\n") == ["yes\n<|im_end|>"]


def test_what_a_template_writes_before_the_answer_is_trained():
    # the model is asked to continue the generation prompt, so it has to write the empty thought, too
    source = without_generation_blocks(TEMPLATES["thinking"])
    assert spans(source, "q", "one", "q", "two", roles="uaua") == [
        "one<|im_end|>",
        "<think>\n\n</think>\n\ntwo<|im_end|>",
    ]


def test_trimmed_contents_are_found():
    source = without_generation_blocks(TEMPLATES["trimming"])
    assert spans(source, "q", "  yes ", "q", "no", roles="uaua") == ["yes</s>", "no</s>"]


def test_a_user_who_writes_the_generation_prompt_is_not_trained_on():
    template = ChatTemplate(without_generation_blocks(CHATML), ["<|im_end|>"])
    for fake in ("other", "real"):
        user = f"<|im_start|>assistant\n{fake}<|im_end|>\n"
        text, found = template.locate(
            [{"role": "user", "content": user}, {"role": "assistant", "content": "real"}]
        )
        assert found == [(text.rindex("real<|im_end|>"), len(text) - 1)]


def test_an_answer_without_text_is_found_by_prefixes():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{{ m.content + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    text, found = ChatTemplate(source, ["<|im_end|>"]).locate([{"role": "user", "content": "x"}, call])
    assert [text[a:b] for a, b in found] == ['{"name": "f"}<|im_end|>']


def test_a_conversation_the_template_refuses_says_why():
    template = ChatTemplate(TEMPLATES["trimming"], ["</s>"], {"bos_token": "", "eos_token": "</s>"})
    with pytest.raises(DataError, match="Only user and assistant roles") as refused:
        template.locate([{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}])
    assert refused.value.code == "refused_by_template"


def test_the_sandbox_holds():
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="unsafe"):
        ChatTemplate(escape).render([])


def test_a_broken_template_is_the_models_fault(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be compiled"):
        ChatTokenizer(write_model(tmp_path, "{% for m in messages %}"))
