"""Output items of a response while they grow, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from ..parsers.custom_input import CustomInput
from ..wire.answers import ChatTokenLogprob
from .wire import (
    ArgumentsDelta,
    ArgumentsDone,
    CustomCallItem,
    CustomInputDelta,
    CustomInputDone,
    FunctionCallItem,
    ItemAdded,
    ItemDone,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    ResponseEvent,
    TextDelta,
    TextDone,
)

Logprobs = list[ChatTokenLogprob]


class GrowingItem:
    """An output item: call `begin`, then `add` for every piece, then `end`; each gives its events."""

    prefix: str

    def __init__(self, output_index: int) -> None:
        self.id = make_id(self.prefix)
        self.output_index = output_index
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def begin(self) -> Iterator[ResponseEvent]:
        yield ItemAdded(output_index=self.output_index, item=self.item("in_progress"))

    def add(self, text: str, logprobs: Logprobs) -> Iterator[ResponseEvent]:
        """Add a piece. `logprobs` are for items that show them; others drop them."""
        self._pieces.append(text)
        yield from ()

    def end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield ItemDone(output_index=self.output_index, item=self.item(status))

    def item(self, status: ItemStatus) -> OutputItem:
        """The item so far."""
        raise NotImplementedError


class GrowingReasoning(GrowingItem):
    prefix = "rs"

    def begin(self) -> Iterator[ResponseEvent]:
        yield from super().begin()
        yield PartAdded(output_index=self.output_index, item_id=self.id, part=ReasoningText(""))

    def add(self, text: str, logprobs: Logprobs) -> Iterator[ResponseEvent]:
        yield from super().add(text, logprobs)
        yield ReasoningDelta(output_index=self.output_index, item_id=self.id, delta=text)

    def end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield ReasoningDone(output_index=self.output_index, item_id=self.id, text=self.text)
        yield PartDone(output_index=self.output_index, item_id=self.id, part=ReasoningText(self.text))
        yield from super().end(status)

    def item(self, status: ItemStatus) -> ReasoningItem:
        return ReasoningItem(self.id, [ReasoningText(self.text)] if self._pieces else [], status)


class GrowingMessage(GrowingItem):
    prefix = "msg"

    def __init__(self, output_index: int) -> None:
        super().__init__(output_index)
        self._logprobs: Logprobs = []

    def begin(self) -> Iterator[ResponseEvent]:
        yield ItemAdded(output_index=self.output_index, item=MessageItem(self.id, [], "in_progress"))
        yield PartAdded(output_index=self.output_index, item_id=self.id, part=OutputText(""))

    def add(self, text: str, logprobs: Logprobs) -> Iterator[ResponseEvent]:
        yield from super().add(text, logprobs)
        self._logprobs += logprobs
        yield TextDelta(output_index=self.output_index, item_id=self.id, delta=text, logprobs=logprobs)

    def end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield TextDone(output_index=self.output_index, item_id=self.id, text=self.text, logprobs=self._logprobs)
        yield PartDone(output_index=self.output_index, item_id=self.id, part=self._part())
        yield from super().end(status)

    def item(self, status: ItemStatus) -> MessageItem:
        return MessageItem(self.id, [self._part()], status)

    def _part(self) -> OutputText:
        return OutputText(self.text, logprobs=self._logprobs)


class GrowingCall(GrowingItem):
    prefix = "fc"

    def __init__(self, output_index: int, name: str, call_id: str | None) -> None:
        super().__init__(output_index)
        self.name = name
        self.call_id = call_id or make_id("call")

    def add(self, text: str, logprobs: Logprobs) -> Iterator[ResponseEvent]:
        yield from super().add(text, logprobs)
        yield ArgumentsDelta(output_index=self.output_index, item_id=self.id, delta=text)

    def end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield ArgumentsDone(output_index=self.output_index, item_id=self.id, name=self.name, arguments=self.text)
        yield from super().end(status)

    def item(self, status: ItemStatus) -> FunctionCallItem:
        return FunctionCallItem(self.id, self.call_id, self.name, self.text, status)


class GrowingCustomCall(GrowingItem):
    """A call of a custom tool. The client gets the text inside the arguments."""

    prefix = "ctc"

    def __init__(self, output_index: int, name: str, call_id: str | None) -> None:
        super().__init__(output_index)
        self.name = name
        self.call_id = call_id or make_id("call")
        self._arguments = CustomInput()

    def add(self, text: str, logprobs: Logprobs) -> Iterator[ResponseEvent]:
        yield from self._add_input(self._arguments.push(text))

    def end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield from self._add_input(self._arguments.finish())
        yield CustomInputDone(output_index=self.output_index, item_id=self.id, input=self.text)
        yield from super().end(status)

    def item(self, status: ItemStatus) -> CustomCallItem:
        return CustomCallItem(self.id, self.call_id, self.name, self.text, status)

    def _add_input(self, text: str) -> Iterator[ResponseEvent]:
        if text:
            self._pieces.append(text)
            yield CustomInputDelta(output_index=self.output_index, item_id=self.id, delta=text)


def make_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
