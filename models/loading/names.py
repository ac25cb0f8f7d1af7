"""How the files of one family spell the tensors' names. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Rename(NamedTuple):
    """As of `re.sub`."""

    pattern: re.Pattern[str]
    replacement: str


class Released(NamedTuple):
    """From a canonical name to the one in released checkpoints. Does not hold for files in which `other`, a second
    spelling of the same, is found."""

    pattern: re.Pattern[str]
    replacement: str
    other: re.Pattern[str]

    @classmethod
    def back(cls, canonical: str, stored: str) -> Released:
        """Where files have not the canonical spelling itself."""
        pattern = re.compile(canonical)
        return cls(pattern, stored, pattern)


class LeftOut(NamedTuple):
    """Tensors of a part of the model that is not served."""

    pattern: re.Pattern[str]  # found in their canonical names
    part: str  # for the log, with its article


@dataclass(frozen=True, slots=True)
class Names:
    """A family's spellings. The canonical name of a tensor is the one that a module's `Target` bears."""

    renames: tuple[Rename, ...]  # from any spelling to the canonical one, made in order
    released: tuple[Released, ...] = ()  # back, for messages, made in order
    ignored: re.Pattern[str] | None = None  # found in the canonical names of tensors that follow from the config
    left_out: tuple[LeftOut, ...] = ()

    def canonical(self, stored: str) -> str:
        """The canonical name of a tensor that a file calls `stored`."""
        for pattern, replacement in self.renames:
            stored = pattern.sub(replacement, stored)
        return stored

    def is_ignored(self, canonical: str) -> bool:
        return self.ignored is not None and self.ignored.search(canonical) is not None

    def part_left_out(self, canonical: str) -> str | None:
        """The part of the model, not served, to which the tensor belongs."""
        return next((part for pattern, part in self.left_out if pattern.search(canonical)), None)

    def as_spelt(self, canonical: str, present: Iterable[str]) -> str:
        """A canonical name in the spelling of files that hold tensors of the names `present`."""
        present = list(present)
        for pattern, replacement, other in self.released:
            if not any(map(other.search, present)):
                canonical = pattern.sub(replacement, canonical)
        return canonical
