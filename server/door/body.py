"""Raw bytes -> one JSON object, or an error that tells the fault and its place. Stricter than `json.loads`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from ...engine.errors import RequestError
from ..errors import ApiError
from ..off_loop import off_loop

BYTES_PER_CHAR = 32  # bytes that are parsed in the time of tokenizing one character
MAX_BYTES_AT_ONCE = 65_536
MAX_FLOAT_CHARS = 400
MAX_SHOWN_CHARS = 80  # of a client's text in an error message
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)

T = TypeVar("T")


async def read_json(request: Request, max_depth: int) -> dict[str, Any]:
    """The body of a request as a JSON object.

    Raises `RequestError`, or `ApiError` 415 for another content type or a compressed body.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = f"Content-Encoding must be identity, got {encoding[:MAX_SHOWN_CHARS]!r}; send the body uncompressed"
        raise ApiError(415, message, code="unsupported_content_encoding", headers={"Accept-Encoding": "identity"})
    content_type = request.headers.get("content-type", "")
    if not JSON_TYPE.fullmatch(content_type.strip()):
        message = f"Content-Type must be application/json, got {content_type[:MAX_SHOWN_CHARS]!r}"
        raise ApiError(415, message, code="unsupported_media_type")
    raw = await request.body()
    return await of_body(request, lambda: parse_object(raw, max_depth))


async def of_body(request: Request, work: Callable[[], T]) -> T:
    """The result of `work` on a request's body; for a long body `work` runs in a thread."""
    return await off_loop(len(await request.body()) // BYTES_PER_CHAR, work)


def parse_object(raw: bytes, max_depth: int, *, is_lenient: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON. Refuses NaN, Infinity, numbers out of range, duplicate keys, lone surrogates, deep nesting.

    `is_lenient` reads JSON as models write it: control characters in strings, NaN and Infinity are taken, and the last
    value of a duplicate key counts. Raises `RequestError`.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            strict=not is_lenient,
            parse_constant=None if is_lenient else _refuse_constant,
            parse_float=_finite_float,
            parse_int=_integer if len(raw) > MAX_BYTES_AT_ONCE else None,
            object_pairs_hook=None if is_lenient else _unique_keys,
        )
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8: bad byte at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError:  # an integer has more digits than Python reads
        raise RequestError("the body has a number that is out of range") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {json_type(value)}")
    if raw.count(b"[") + raw.count(b"{") > max_depth:
        _check_depth(value, max_depth)
    if SURROGATE_ESCAPE.search(raw):
        _check_surrogates(value)
    return value


def json_type(value: object) -> str:
    """JSON's name of the type of `value`, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def shown(value: object) -> str:
    """A value of a request in an error message: a string's beginning in quotes, anything else as its type."""
    return repr(value)[:MAX_SHOWN_CHARS] if isinstance(value, str) else json_type(value)


def require_type(value: Any, kind: type, where: str) -> Any:
    """`value` itself. Raises `RequestError` naming the field `where` when it is of another type than `kind`."""
    if isinstance(value, kind):
        return value
    expected = {list: "a list", dict: "an object", str: "a string", bool: "a boolean"}[kind]
    raise RequestError(f"{where} must be {expected}, got {json_type(value)}", where)


def drop_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null: null always means the default."""
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body is not valid JSON: {name} is not a JSON number")


def _integer(digits: str) -> int:
    """The parser's own conversion. A call from C per integer lets other threads in during a list of a million ids."""
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_FLOAT_CHARS else math.inf
    if not math.isfinite(value):
        raise RequestError(f"the body has a number that is out of range: {digits[:40]}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RequestError(f"the body has the key {key[:MAX_SHOWN_CHARS]!r} twice in one object")
            seen.add(key)
    return found


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise _too_deep(max_depth)


def _too_deep(max_depth: int) -> RequestError:
    return RequestError(f"the body nests deeper than {max_depth} levels (setting max_body_depth)")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(r"the body has a lone surrogate (\ud800 to \udfff) in a string") from None
