"""The answers of /v1/responses, checked by the official client's types."""

from __future__ import annotations

import pytest
from responses import (
    CALLS,
    LOGPROBS,
    REPLIES,
    THOUGHT,
    TIME,
    WEATHER,
    answer_of,
    assembled,
    events_of,
    without_ids,
)


async def test_response_is_a_message_and_repeats_the_requests_settings(respond):
    body = {"instructions": "Be kind", "temperature": 0.5, "metadata": {"a": "b"}, "user": "u", "max_output_tokens": 20}
    answer = answer_of(await respond("Hello", **body))
    (item,) = answer["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert body.items() <= answer.items()
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    assert (answer["store"], answer["previous_response_id"], answer["tool_choice"]) == (False, None, "auto")
    usage = answer["usage"]
    assert usage["output_tokens"] == 6
    assert usage["total_tokens"] == usage["input_tokens"] + 6
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("bound", [None, 1, 20, 60])
async def test_a_stream_ends_in_the_whole_answer_and_its_deltas_add_up_to_it(respond, reply, bound):
    body = {"tools": [WEATHER, TIME], "include": [LOGPROBS], "top_logprobs": 2, "max_output_tokens": bound}
    whole = answer_of(await respond(reply, **body))
    events = events_of(await respond(reply, **body, stream=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    texts = [item.get("arguments", "") or "".join(p["text"] for p in item.get("content", [])) for item in done]
    assert [item["text"] for item in assembled(events)] == texts
    for index, item in enumerate(done):
        if item["type"] == "message":
            shown = [e for e in events if e["type"] == "response.output_text.delta" and e["output_index"] == index]
            assert [entry for event in shown for entry in event["logprobs"]] == item["content"][0]["logprobs"]


async def test_thoughts_words_and_calls_are_items_in_their_order(respond):
    answer = answer_of(await respond(REPLIES["a thought, words and calls"], tools=[WEATHER, TIME]))
    thought, message, weather, time = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm, a city."}]
    assert thought["summary"] == []
    assert message["content"][0]["text"] == "Let me see."
    assert (weather["name"], weather["arguments"]) == ("get_weather", '{"city": "Köln"}')
    assert (time["name"], time["arguments"]) == ("get_time", "{}")
    assert weather["call_id"] != time["call_id"]
    assert len({item["id"] for item in answer["output"]}) == 4
    assert {item["status"] for item in answer["output"]} == {"completed"}


async def test_only_the_item_that_was_cut_off_is_incomplete(respond):
    reply = REPLIES["a thought, words and calls"]
    answer = answer_of(await respond(reply, tools=[WEATHER, TIME], max_output_tokens=len(reply.encode()) - 20))
    assert [item["status"] for item in answer["output"]] == ["completed"] * 3 + ["incomplete"]


async def test_a_thought_to_be_sent_back_comes_in_the_open_whether_encrypted_or_not(respond):
    asked = {"include": ["reasoning.encrypted_content"], "store": False}
    response = await respond(THOUGHT + "Sunny.", **asked)
    thought, message = answer_of(response)["output"]
    assert thought["content"][0]["text"] == "Hm, a city." and message["content"][0]["logprobs"] == []
    assert "encrypted_content" not in thought
    assert response.headers["x-ignored-parameters"] == "include.reasoning.encrypted_content"
    again = await respond("Sunny.", input=[{"role": "user", "content": "Hi"}, thought, message], **asked)
    assert answer_of(again)["status"] == "completed"


async def test_reasoning_tokens_end_with_the_thought(respond):
    details = answer_of(await respond(THOUGHT + "Sunny."))["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": len(THOUGHT.rstrip())}


@pytest.mark.parametrize(
    ("asked", "texts"), [({}, ["a\n\nb", "Yes."]), ({"stop_in_reasoning": True}, ["a"])], ids=["answer", "whole"]
)
async def test_stop_strings_end_the_answer_and_not_the_thought(respond, asked, texts):
    reply = "<think>\na\n\nb\n</think>\n\nYes.\n\nNo."
    answer = answer_of(await respond(reply, stop="\n\n", **asked))
    assert [item["content"][0]["text"] for item in answer["output"]] == texts
    assert answer["usage"]["output_tokens"] == reply.index("No.") if len(texts) > 1 else len("<think>\na\n\n")
    events = events_of(await respond(reply, stop="\n\n", stream=True, **asked))
    assert without_ids(events[-1]["response"]) == without_ids(answer)


async def test_an_answer_that_is_cut_off_is_incomplete(respond):
    answer = answer_of(await respond("Hello", max_output_tokens=2))
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "He"


async def test_an_answer_without_a_word_is_an_empty_message(respond):
    (item,) = answer_of(await respond(""))["output"]
    assert item["content"][0]["text"] == ""


async def test_log_probabilities_come_for_every_token(respond):
    answer = answer_of(await respond("Hello", include=[LOGPROBS], top_logprobs=2))
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == [*"Hello", "</s>"]
    assert {len(entry["top_logprobs"]) for entry in logprobs} == {2}


async def test_one_call_only_without_parallel_calls(respond):
    answer = answer_of(await respond(CALLS, tools=[WEATHER, TIME], parallel_tool_calls=False))
    assert [item["name"] for item in answer["output"]] == ["get_weather"]
    assert answer["parallel_tool_calls"] is False


async def test_a_failure_in_mid_stream_is_an_error_and_a_failed_response(respond, engine):
    engine.die_after = 3
    *_, error, failed = events_of(await respond("Hello", stream=True))
    assert (error["type"], error["code"]) == ("error", "engine_dead")
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert response["output"][0]["content"][0]["text"] == "Hel"
    assert response["output"][0]["status"] == "incomplete"


async def test_a_failure_before_the_first_token_has_its_status(respond, engine, error_of):
    engine.queue_bound = 0
    assert error_of(await respond(stream=True), 429)["code"] == "rate_limit_exceeded"
