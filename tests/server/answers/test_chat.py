from __future__ import annotations

import pytest
from openai.types.chat import ChatCompletion

BOS, EOS, USER, ASSISTANT, SYSTEM, TOOL = range(256, 262)


def validated(response):
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate(response.json(), strict=True)


async def test_a_chat_completion_has_exactly_the_documented_keys(chat):
    body = (await chat()).json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    message = {"content": "Hello, world", "role": "assistant", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 13,
        "total_tokens": 19,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_chat_template_lays_out_all_roles(chat, engine):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}], "name": "Ann"},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "tool", "content": "t", "tool_call_id": "call_1"},
    ]
    validated(await chat(messages=messages))
    sent = [BOS]
    for role, text in ((SYSTEM, "s"), (SYSTEM, "d"), (USER, "u\nv"), (ASSISTANT, "a"), (TOOL, "t")):
        sent += [role, *text.encode(), EOS]
    assert engine.requests[0].prompt_token_ids == [*sent, ASSISTANT]


REFUSAL = {"type": "refusal", "refusal": "No."}
ASSISTANT_MESSAGES = {
    "null": ({"content": None}, ""),
    "nothing": ({}, ""),
    "refusal beside null": ({"content": None, "refusal": "No."}, "No."),
    "refusal beside text": ({"content": "Well.", "refusal": "No."}, "Well.\nNo."),
    "no refusal": ({"content": "a", "refusal": ""}, "a"),
    "refusal as a part": ({"content": [REFUSAL]}, "No."),
    "parts": ({"content": [{"type": "text", "text": "Well."}, REFUSAL]}, "Well.\nNo."),
}


@pytest.mark.parametrize(("fields", "text"), ASSISTANT_MESSAGES.values(), ids=ASSISTANT_MESSAGES)
async def test_any_earlier_answer_is_accepted_as_history(chat, engine, fields, text):
    validated(await chat(messages=[{"role": "user", "content": "u"}, {"role": "assistant"} | fields]))
    said = [ASSISTANT, *text.encode(), EOS]
    assert engine.requests[0].prompt_token_ids == [BOS, USER, *b"u", EOS, *said, ASSISTANT]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None},
        {"role": "system"},
        {"role": "user", "content": [REFUSAL]},
        {"role": "assistant", "content": [{"type": "refusal", "text": "No."}]},
        {"role": "assistant", "content": [{"type": []}]},
        {"role": "assistant", "refusal": 7},
    ],
    ids=str,
)
async def test_other_messages_must_have_text(chat, error_of, message):
    assert error_of(await chat(messages=[message]), 400)["param"].startswith("messages[0].")


async def test_the_answer_may_fill_the_context_when_no_bound_is_given(chat, engine):
    engine.reply = b"x" * 1000
    answer = validated(await chat())
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == engine.info.max_model_len


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_bound_work(chat, name):
    answer = validated(await chat(**{name: 3}))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hel", "length")


async def test_n_choices_come_in_order(chat, engine):
    engine.choose_reply = lambda request: request.request_id[-1].encode()
    answer = validated(await chat(n=3))
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "0"), (1, "1"), (2, "2")]


async def test_chat_logprobs_have_bytes_and_exactly_the_top_asked_for(chat, engine):
    engine.reply = "é".encode()
    content = validated(await chat(logprobs=True, top_logprobs=2)).choices[0].logprobs.content
    assert [entry.bytes for entry in content[:2]] == [[0xC3], [0xA9]]
    assert [entry.logprob for entry in content[:2]] == [-1.5, -1.5]
    assert [[top.logprob for top in entry.top_logprobs] for entry in content[:2]] == [[-0.25, -0.5]] * 2


async def test_chat_logprobs_without_top_have_an_empty_list(chat, engine):
    engine.reply = b"a"
    content = validated(await chat(logprobs=True)).choices[0].logprobs.content
    assert content[0].token == "a"
    assert content[0].top_logprobs == []


async def test_continue_final_message_leaves_the_last_message_open(chat, engine):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    validated(await chat(messages=messages, continue_final_message=True))
    assert engine.requests[0].prompt_token_ids == [BOS, USER, ord("u"), EOS, ASSISTANT, ord("a")]


async def test_add_generation_prompt_false_is_obeyed(chat, engine):
    validated(await chat(add_generation_prompt=False))
    assert engine.requests[0].prompt_token_ids[-1] == EOS


async def test_return_token_ids_in_chat(chat, engine):
    engine.reply = b"ab"
    body = (await chat(return_token_ids=True)).json()
    assert body["prompt_token_ids"] == [BOS, USER, 72, 105, EOS, ASSISTANT]
    assert body["choices"][0]["token_ids"] == [97, 98, EOS]


async def test_a_checkpoint_without_template_refuses_chat_by_name(chat, tokenizer, error_of):
    tokenizer.has_chat_template = False
    assert error_of(await chat(), 400)["param"] == "messages"


async def test_refusal_of_the_template_is_the_clients_error(chat, error_of):
    error = error_of(await chat(messages=[{"role": "user", "content": "refuse me"}]), 400)
    assert "refused the messages" in error["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([7], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1"}], "messages[1].content"),
    ],
)
async def test_a_bad_message_is_refused_by_its_place(chat, error_of, messages, param):
    assert error_of(await chat(messages=messages), 400)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ],
)
async def test_a_bad_chat_field_is_refused_by_name(chat, error_of, body, param):
    assert error_of(await chat(**body), 400)["param"] == param
