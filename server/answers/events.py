"""An event is an output of the engine with its choice. A request gets one stream of the events of all choices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from ...engine.outputs import RequestOutput
from ..door.choices import Choice
from ..door.validation import Prepared

Event = tuple[Choice, RequestOutput]
Events = AsyncGenerator[Event, None]
# (request, the served model's name, the answer's id, its events) -> the same events, observed as they pass.
Watch = Callable[[Prepared[Any], str, str, Events], Events]
