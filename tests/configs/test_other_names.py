"""The names of other engines' settings are answered by Leyden's."""

from __future__ import annotations

import re

import pytest
from given_settings import refused
from leyden.configs import other_names
from leyden.configs.schema import Settings


def test_another_engines_name_for_a_setting_is_answered_by_ours(tmp_path):
    text = "gpu_memory_utilization: 0.9"
    refused("settings.yaml", "the setting is memory_fraction here", text=text, folder=tmp_path)
    refused("the prefix cache is off with prefix_cache: false", flags={"no_enable_prefix_caching": True})
    refused("CUDA graphs are off with cuda_graphs: false", environ={"LEYDEN_ENFORCE_EAGER": "1"})


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("-tp", "on one device"),
        ("--tp", "on one device"),
        ("--pp-size", "on one device"),
        ("--dp", "a server for each GPU"),
        ("--allowed-origins", "the setting is --cors-origins here"),
        ("--lora-modules", "adapters are not implemented"),
    ],
)
def test_short_names_of_other_engines_flags_are_known_too(flag, told):
    assert told in (other_names.hint_for(flag, as_flags=True) or "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("state_checkpoints", "snapshots"),
        ("state_checkpoint_interval", "snapshot_interval"),
        ("state_checkpoint_min_tokens", "snapshot_min_tokens"),
        ("state_checkpoint_dtype", "snapshot_dtype"),
        ("host_checkpoint_gb", "host_snapshot_gb"),
    ],
)
def test_an_earlier_name_of_a_setting_is_refused_and_the_present_one_told(tmp_path, old, new):
    refused(old, f"the setting is {new} here", text=f"{old}: 1", folder=tmp_path)
    refused(old, f"the setting is {new} here", environ={f"LEYDEN_{old.upper()}": "1"})
    flag = f"--{old.replace('_', '-')}"
    assert other_names.hint_for(flag, as_flags=True) == f"the setting is --{new.replace('_', '-')} here"


def test_hints_for_other_engines_name_settings_that_exist():
    spelled = {name for text in other_names.ANSWERS.values() for name in re.findall(r"\{(\w+)\}", text)}
    named = set(other_names.RENAMED.values()) | {name.removeprefix("no_") for name in spelled}
    assert named <= set(Settings.model_fields)
    assert not (other_names.RENAMED.keys() | other_names.ANSWERS.keys()) & set(Settings.model_fields), "known already"
