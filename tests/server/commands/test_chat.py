"""`leyden chat` against the real app on a socket, with a user who is a list of lines."""

from __future__ import annotations

import builtins
import json
import re
import sys
import threading
from types import SimpleNamespace

import pytest
from leyden.server.answers.streaming import EventStream
from leyden.server.commands.cli import main


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


def test_comments_before_the_first_token_are_skipped(make_live, chat_with, engine, monkeypatch, capsys):
    monkeypatch.setattr(EventStream, "patience", 0.01)
    engine.hold_after = 0
    threading.Timer(0.3, setattr, (engine, "hold_after", None)).start()
    assert chat_with(make_live().url, ["x"]) == 0
    assert "Hello, world" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("flags", "told"), [((), "no key was sent"), (("--api-key", "other"), "does not take the key")]
)
def test_a_refused_key_is_told_with_the_way_to_give_one(make_live, chat_with, monkeypatch, capsys, flags, told):
    monkeypatch.delenv("LEYDEN_API_KEY", raising=False)
    assert chat_with(make_live(api_key=["secret"]).url, ["hi"], *flags) == 1
    error = capsys.readouterr().err
    assert told in error and "--api-key" in error and "LEYDEN_API_KEY" in error


def test_help_lists_the_commands_and_is_no_message(make_live, chat_with, tokenizer, capsys):
    assert chat_with(make_live().url, ["/help", "one"]) == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("/help ", "/reset ", "/quit ", "Ctrl-D", "Ctrl-C"))
    assert conversations(tokenizer) == [["one"]]


def test_a_command_that_is_none_is_told_and_is_no_message_while_a_path_is_one(make_live, chat_with, tokenizer, capsys):
    assert chat_with(make_live().url, ["/exit", "/etc/hosts", "/clear"]) == 0
    told = capsys.readouterr().out
    assert "/exit is no command; /help" in told and "/clear is no command" in told
    assert conversations(tokenizer) == [["/etc/hosts"]]


def serving(make_live, *events, name="other"):
    """The url of a server that answers a chat with these events."""

    async def app(scope, receive, send):
        if scope["path"] == "/v1/models":
            body = json.dumps({"data": [{"id": name}]}).encode()
        else:
            body = b"".join(b"data: " + event + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for at in range(0, len(body), 7):
            await send({"type": "http.response.body", "body": body[at : at + 7], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return make_live(app).url


def delta(**fields):
    """As most servers write JSON: with every character as it is."""
    return json.dumps({"choices": [{"delta": fields}]}, ensure_ascii=False).encode()


# Colour, title, copy to the clipboard, C1's own introducer, erase, overwrite, override of the direction.
STEERING = "\x1b[31m \x1b]0;title\x07 \x1b]52;c;aGk=\x1b\\ \x9b2J \x7f\x08 safe\rvil \u202egnp.exe\u2066"


def test_nothing_that_a_server_says_steers_the_terminal(make_live, chat_with, capsys):
    kept = "a\tb\nc \u00a0é\u200d\u3000\u05d0 \U0001f469"
    url = serving(make_live, delta(reasoning_content=STEERING), delta(content=STEERING + kept), name=f"m{STEERING}")
    assert chat_with(url, ["hi"]) == 0
    refused = json.dumps({"error": {"message": STEERING}}).encode()
    assert chat_with(serving(make_live, refused), ["hi"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(r"\x1b[31m \x1b]0;title\x07") == 3 and captured.err.count(r"safe\rvil \u202egnp") == 1
    assert kept in captured.out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", captured.out + captured.err)


def test_an_error_before_the_first_turn_steers_nothing_either(make_live, chat_with, capsys):
    async def refusing(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": STEERING.encode()})

    assert chat_with(make_live(refusing).url, ["hi"]) == 1
    assert r"\x1b[31m" in (error := capsys.readouterr().err) and "\x1b" not in error


def test_an_answer_may_have_any_character_that_ends_a_line_elsewhere(make_live, chat_with, capsys):
    url = serving(make_live, *(delta(content=f"one{end}two") for end in "\u2028\u2029\x85\x0b\x0c\x1c"))
    assert chat_with(url, ["hi"]) == 0
    assert capsys.readouterr().out.count("two") == 6


@pytest.mark.parametrize(
    "event", [b"{", b"5", b"{}", b'{"error": "busy"}', b'{"choices": [{}]}', b"\xff", b'{"choices": 5}']
)
def test_an_event_of_another_kind_is_an_error_of_that_turn(make_live, chat_with, event, capsys):
    assert chat_with(serving(make_live, event), ["hi"]) == 1
    assert "an event that is none of a chat" in capsys.readouterr().err


def test_a_line_that_is_not_utf_8_is_refused_and_taken_back(make_live, chat_with, tokenizer, capsys):
    assert chat_with(make_live().url, ["\udce9", "one"]) == 0
    assert "surrogate" in capsys.readouterr().err and conversations(tokenizer) == [["one"]]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_generate_steers_no_terminal_and_leaves_a_pipe_as_it_is(monkeypatch, capsys, is_terminal):
    class Model:
        def __init__(self, **_): ...

        def generate(self, prompts, params):
            return [SimpleNamespace(text=STEERING, finish_reason="stop")]

    monkeypatch.setattr("leyden.engine.llm.LLM", Model)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert main(["generate", "Hi"]) == 0
    assert ("\x1b" in capsys.readouterr().out) != is_terminal


@pytest.mark.parametrize(("reason", "code"), [("error", 1), ("length", 0)])
def test_generate_fails_where_an_answer_has_failed(monkeypatch, reason, code):
    class Model:
        def __init__(self, **_): ...

        def generate(self, prompts, params):
            return [SimpleNamespace(text="", finish_reason=why) for why in ("stop", reason)]

    monkeypatch.setattr("leyden.engine.llm.LLM", Model)
    assert main(["generate", "One", "Two"]) == code


def test_a_server_of_another_kind_is_told_so(make_live, chat_with, capsys):
    async def other(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"hi"})

    assert chat_with(make_live(other).url, []) == 1
    assert "answers no list of models" in capsys.readouterr().err
