"""The benchmark's reader of responses: bytes may be cut anywhere."""

from __future__ import annotations

import pytest
from leyden.benchmarks.load.parser import MalformedResponse, ResponseParser

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENTS = [b'data: {"a": 1}\n\n', b": a comment\n\n", b'data:{"b": "\xe2\x82\xac"}\r\n\r\n', b"data: [DONE]\n\n"]
PAYLOADS = [b'{"a": 1}', b'{"b": "\xe2\x82\xac"}', b"[DONE]"]


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


BODY = b"".join(EVENTS)
RESPONSES = {
    "an event per chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS),
    "events cut by chunks": HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY[:9], BODY[9:30], BODY[30:]),
    "extensions and trailers": HEAD
    + b"transfer-encoding: chunked\r\n\r\n%x;x=1\r\n%s\r\n" % (len(BODY), BODY)
    + b"0\r\nx-trailer: 1\r\n\r\n",
    "a length": HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
}


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_payloads_are_the_same_wherever_the_bytes_are_cut(response):
    for cut in range(len(response) + 1):
        parser = ResponseParser()
        assert parser.feed(response[:cut]) + parser.feed(response[cut:]) == PAYLOADS, cut
        assert (parser.status, parser.is_complete, parser.keeps_alive) == (200, True, True)
    parser = ResponseParser()
    assert [payload for byte in response for payload in parser.feed(bytes([byte]))] == PAYLOADS


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_a_connection_that_ends_early_is_malformed_at_every_byte(response):
    for cut in range(len(response)):
        parser = ResponseParser()
        parser.feed(response[:cut])
        assert not parser.is_complete
        with pytest.raises(MalformedResponse):
            parser.close()


def test_a_body_without_a_length_ends_with_the_connection_and_the_connection_with_it():
    parser = ResponseParser()
    assert parser.feed(HEAD + b"\r\n" + BODY) == PAYLOADS
    assert not parser.is_complete
    parser.close()
    assert parser.is_complete
    assert not parser.keeps_alive


def test_connection_close_is_honoured():
    parser = ResponseParser()
    parser.feed(HEAD + b"Connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(BODY))
    assert not parser.keeps_alive


def test_the_body_of_an_error_is_kept_and_is_no_payload():
    parser = ResponseParser()
    body = b'data: {"error": 1}\n\n'
    assert parser.feed(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)) == []
    assert (parser.status, parser.body, parser.is_complete) == (429, body, True)


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 ok\r\n\r\n",
        HEAD + b"content-length: many\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_not_http_is_malformed(response):
    with pytest.raises(MalformedResponse):
        ResponseParser().feed(response)
