"""`leyden chat` against the real app on a socket, with a user who is a list of lines."""

from __future__ import annotations

import builtins

import pytest
from leyden.server.cli import main


@pytest.fixture
def chat_with(monkeypatch):
    """chat_with(url, lines, *flags) -> the exit code of a conversation of these lines."""

    def run(url, lines, *flags):
        said = iter(lines)

        def read(_):
            try:
                return next(said)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", read)
        return main(["chat", "--url", url, *flags])

    return run


def conversations(tokenizer):
    return [[message["content"] for message in messages] for messages, _ in tokenizer.chats]


def test_an_answer_is_as_long_as_the_context_lets_it(make_live, chat_with, engine, capsys):
    assert chat_with(make_live().url, ["x" * 100]) == 0
    assert "Hello, world" in capsys.readouterr().out
    assert engine.requests[0].sampling_params.max_tokens < 128 - 100


def test_max_tokens_is_sent_when_it_is_given(make_live, chat_with, engine):
    assert chat_with(make_live().url, ["x"], "--max-tokens", "3") == 0
    assert engine.requests[0].sampling_params.max_tokens == 3


def test_a_turn_that_fails_is_told_and_taken_back(make_live, chat_with, tokenizer, capsys):
    assert chat_with(make_live().url, ["one", "refuse me" * 100, "two"]) == 0
    captured = capsys.readouterr()
    assert "the context length is 128" in captured.err and "/reset" in captured.err
    assert conversations(tokenizer)[-1] == ["one", "Hello, world", "two"]


def test_reset_starts_over_with_the_system_message(make_live, chat_with, tokenizer):
    assert chat_with(make_live().url, ["one", "/reset", "two"], "--system", "be brief") == 0
    assert conversations(tokenizer)[-1] == ["be brief", "two"]


def test_a_last_turn_that_fails_is_an_exit_code_for_scripts(make_live, chat_with, engine, capsys):
    engine.die_after = 3
    assert chat_with(make_live().url, ["one"]) == 1
    captured = capsys.readouterr()
    assert "Hel\n" in captured.out and "the engine stopped" in captured.err


@pytest.mark.parametrize("key", ["kéy", "\udce9"], ids=["UTF-8", "not UTF-8"])
def test_a_key_is_sent_as_its_bytes(make_live, chat_with, key, capsys):
    url = make_live(api_key=["kéy"]).url
    assert chat_with(url, ["hi"], "--api-key", key) == (0 if key == "kéy" else 1)
    assert ("a valid API key is required" in capsys.readouterr().err) == (key != "kéy")


def test_a_server_of_another_kind_is_told_so(make_live, chat_with, capsys):
    async def other(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"hi"})

    assert chat_with(make_live(other).url, []) == 1
    assert "answers no list of models" in capsys.readouterr().err
