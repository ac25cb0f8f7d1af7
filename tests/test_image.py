"""The image and the compose file ask for no more than a server needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LAST_STAGE = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
SERVICE = yaml.safe_load((ROOT / "tools" / "observability" / "compose.yaml").read_text())["services"]["leyden"]


def instruction(name: str) -> str:
    (found,) = re.findall(rf"^{name} (.*)$", LAST_STAGE, flags=re.MULTILINE)
    return found


def test_the_server_is_no_root_by_number():
    assert int(instruction("USER")) > 0


def test_the_server_is_process_one_and_gets_the_signals():
    assert json.loads(instruction("ENTRYPOINT")) == ["leyden"], "a shell in between would keep them"


def test_it_does_not_run_in_the_source():
    assert "leyden" not in instruction("WORKDIR").removeprefix("/home/leyden")
    assert not re.search(r"^COPY (?!--from)", LAST_STAGE, flags=re.MULTILINE), "only what was installed is copied"


def test_compose_drops_what_a_server_does_not_need():
    assert SERVICE["read_only"] is True and SERVICE["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in SERVICE["security_opt"]
    assert SERVICE["tmpfs"] == ["/tmp:exec"], "Triton compiles its launchers there"
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(SERVICE)
