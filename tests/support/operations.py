"""The operations of the contracts in `leyden.kernels`."""

from __future__ import annotations

import inspect
from typing import get_type_hints

from leyden.kernels import Kernels

GROUPS = {name: contract for name, contract in get_type_hints(Kernels).items() if name != "sample"}
OPERATIONS = [
    f"{group}.{name}"
    for group, contract in GROUPS.items()
    for name, member in vars(contract).items()
    if inspect.isfunction(member) and name[0] != "_"
]
