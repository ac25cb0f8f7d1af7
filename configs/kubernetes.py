"""Variables that Kubernetes adds to a container's environment for each Service of its namespace.

Variables of a Service called `leyden`, or `leyden-...`, begin as settings do: LEYDEN_PORT=tcp://10.0.0.7:8000.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PORT = r"PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
_NAME = re.compile(rf"LEYDEN_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|{_PORT})")
_NAME_OF_URL = re.compile(r"LEYDEN_(\w+_)?PORT")
_URL = re.compile(r"(tcp|udp|sctp)://\S+")


def injected_names(environ: Mapping[str, str]) -> list[str]:
    """The variables that are Kubernetes' and no settings, sorted."""
    return sorted(
        name
        for name, text in environ.items()
        if _NAME.fullmatch(name) or (_NAME_OF_URL.fullmatch(name) and _URL.fullmatch(text))
    )
