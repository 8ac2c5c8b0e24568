"""Single rows: fields, types, ranges, and which messages are trained on."""

from __future__ import annotations

from typing import Any

import pytest

from modeseek_ray.data.rows import Chat, Completion, parse_row
from modeseek_ray.errors import DataError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def completion(**more: Any) -> dict[str, Any]:
    return {"prompt": "p", "completion": "c", **more}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({}, "missing_field", "no `prompt` (and no `messages`)"),
        ({"prompt": "p"}, "missing_field", "no `completion`."),
        ({"completion": "p"}, "missing_field", "no `prompt`."),
        (
            completion(compleiton="x"),
            "unknown_field",
            "unknown field `compleiton` (did you mean `completion`?)",
        ),
        (completion(rewards=1), "unknown_field", "did you mean `reward`?"),
        ({"message": []}, "unknown_field", "did you mean `messages`?"),
        (completion(zzz=1), "unknown_field", "unknown field `zzz`."),
        (completion(messages=[]), "mixed_shapes", "both `messages` and"),
        (completion() | {"completion": ""}, "empty_completion", "`completion` is empty"),
        (completion() | {"completion": 3}, "wrong_type", "`completion` is not text"),
        (completion() | {"prompt": ["p"]}, "wrong_type", "`prompt` is not text"),
        (completion(reward="1"), "wrong_type", "`reward` is not a number"),
        (completion(reward=True), "wrong_type", "`reward` is not a number"),
        (completion(reward=float("inf")), "not_finite", "`reward` is inf"),
        (completion(reward=1e999), "not_finite", "`reward` is inf"),
        (completion(reward=1.1e6), "bad_reward", "outside [-1e+06, 1e+06]"),
        (completion(reward=-1.1e6), "bad_reward", "outside"),
        (completion(weight=-0.1), "bad_weight", "`weight` is -0.1, outside [0, 1e+06]"),
        (completion(weight=float("nan")), "not_finite", "`weight` is nan"),
        (completion(group=1.5), "wrong_type", "`group` is neither text nor an integer"),
        (completion(group=True), "wrong_type", "`group`"),
        (completion(id=[1]), "wrong_type", "`id`"),
        (completion(task=1), "wrong_type", "`task` is not text"),
        (completion(logprobs="x"), "wrong_type", "`logprobs` is neither"),
        (completion(logprobs=[-1, None]), "wrong_type", "`logprobs` is neither"),
        (completion(logprobs=[-1, 0.1]), "bad_logprobs", "holds 0.1"),
        (completion(logprobs=0.5), "bad_logprobs", "holds 0.5"),
        (completion(logprobs=[float("-inf")]), "bad_logprobs", "holds -inf"),
        (completion(accept=["x"]), "unknown_field", "`accept` has no meaning"),
        (chat(), "wrong_type", "not a list of messages"),
        ({"messages": "hello"}, "wrong_type", "not a list of messages"),
        (chat("hello"), "wrong_type", "messages[0] is not an object"),
        (chat(USER, {"content": "x"}), "missing_field", "messages[1] has no `role`"),
        (chat(USER, {"role": "asistant", "content": "x"}), "wrong_type", "did you mean `assistant`?"),
        (chat(USER, {"role": "assistant"}), "missing_field", "messages[1] has no `content`"),
        (chat(USER, {"role": "assistant", "content": 5}), "wrong_type", "messages[1].content is not text"),
        (chat({"role": "user", "content": [{"type": "image_url"}]}), "wrong_type", "a part that is not text"),
        (
            chat(USER, {**ANSWER, "wieght": 1}),
            "unknown_field",
            "`messages[1].wieght` (did you mean `weight`?)",
        ),
        (chat(USER, {**ANSWER, "weight": 0.5}), "bad_weight", "messages[1].weight is 0.5, not 0 or 1"),
        (chat(USER, {**ANSWER, "weight": True}), "bad_weight", "not 0 or 1"),
        (chat({**USER, "weight": 1}, ANSWER), "bad_weight", "only assistant messages"),
        (
            chat(USER, {**ANSWER, "content": ""}),
            "empty_completion",
            "messages[1], which is trained on, is empty",
        ),
        (chat(USER), "no_trained_token", "no assistant message"),
        (chat(USER, {**ANSWER, "weight": 0}), "no_trained_token", "no assistant message is trained on"),
        (chat(USER, ANSWER, tools="f"), "wrong_type", "`tools` is not a list"),
    ],
)
def test_a_bad_row_is_refused_by_kind(record, kind, message):
    with pytest.raises(DataError) as refused:
        parse_row(0, record)
    assert refused.value.code == kind
    assert message in refused.value.message
    assert refused.value.mend


def test_everything_a_row_can_say():
    row = parse_row(
        4, completion(weight=2, reward=-1, group="g", logprobs=[-1, -0.5], id=3, task="sort") | {"prompt": ""}
    )
    assert row.answers == [Completion("", "c")]
    assert (row.number, row.prior, row.reward, row.group, row.id, row.task) == (4, 2.0, -1.0, "g", 3, "sort")
    assert row.logprobs == [-1.0, -0.5]
    assert not row.is_graded


def test_a_null_field_counts_as_absent():
    row = parse_row(0, completion(reward=None, group=None, messages=None, accept=None))
    assert (row.reward, row.group, row.prior) == (None, None, 1.0)


def test_messages_reach_the_template_without_our_weights():
    tools = [{"type": "function"}]
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    messages = [
        {"role": "user", "content": parts},
        {**ANSWER, "weight": 0},
        call,
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {**ANSWER, "weight": 1},
    ]
    (answer,) = parse_row(0, chat(*messages, tools=tools)).answers
    assert isinstance(answer, Chat)
    assert [m["content"] for m in answer.messages] == ["xy", "a", "", "r", "a"]
    assert answer.trained == [False, True, True]
    assert not any("weight" in m for m in answer.messages)
    assert (answer.tools, answer.messages[2]["tool_calls"]) == (tools, [{"id": "1"}])


def test_accepted_answers_are_further_answers_of_held_out_rows():
    row = parse_row(0, completion(accept=["d", "e", "d"]), "validation")
    assert row.answers == [Completion("p", "c"), Completion("p", "d"), Completion("p", "e")]
    assert row.is_graded
    with pytest.raises(DataError, match="list of texts"):
        parse_row(0, completion(accept=["d", ""]), "retention")


def test_which_held_out_rows_are_graded():
    assert parse_row(0, chat(USER, ANSWER, task="sort"), "retention").is_graded
    assert parse_row(0, completion(accept=[]), "retention").is_graded
    assert not parse_row(0, completion(task="text"), "retention").is_graded
    assert not parse_row(0, chat(USER, ANSWER), "retention").is_graded
    assert not parse_row(0, chat(USER, ANSWER, task="sort"), "training").is_graded
    assert not parse_row(0, completion(), "retention").is_graded
    assert not parse_row(0, completion(task="sort"), "training").is_graded


def test_a_graded_conversation_is_graded_on_its_last_answer():
    def answers(**more: Any) -> list[Chat]:
        found = parse_row(0, chat(USER, ANSWER, USER, ANSWER, **more), "validation").answers
        return [answer for answer in found if isinstance(answer, Chat)]

    graded = answers(accept=["b"])
    assert [a.trained for a in graded] == [[False, True]] * 2
    assert ["".join(m["content"] for m in a.messages) for a in graded] == ["qaqa", "qaqb"]
    assert [a.trained for a in answers()] == [[True, True]]
