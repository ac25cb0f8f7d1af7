"""The dashboard asks for what `/metrics` has, and compose mounts what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from leyden.engine.messages import EngineStats, MemoryUse
from leyden.server.metrics import ServerMetrics
from prometheus_client.parser import text_string_to_metric_families

FOLDER = Path(__file__).parents[2] / "tools" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
FUNCTIONS = {"sum", "max", "by", "rate", "histogram_quantile"}


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Names of a rendered /metrics, with their labels; but for the times at which counters were made."""
    info = SimpleNamespace(
        num_kv_blocks=10,
        num_state_slots=8,
        block_size=16,
        num_snapshots=6,
        num_host_snapshots=0,
        state_dtype="float32",
        linear_backend="auto",
        memory=MemoryUse(total=1, weights=1),
    )
    metrics = ServerMetrics(SimpleNamespace(stats=EngineStats(), info=info), "leyden", "tiny")
    metrics.count_refusal("overloaded")
    metrics.count_ignored()
    found: dict[str, set[str]] = {}
    for metric in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def names(expression: str) -> list[str]:
    """Metric names of a PromQL expression. Whatever word is neither one nor a function or label we know is an error."""
    rest = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)', " ", expression)
    words = re.findall(r"[A-Za-z_:][\w:]*", rest)
    metrics = [word for word in words if ":" in word]
    assert set(words) - set(metrics) <= FUNCTIONS, expression
    return metrics


@pytest.mark.parametrize(("title", "expression"), QUERIES)
def test_every_query_asks_for_what_there_is(samples, title, expression):
    metrics = names(expression)
    assert metrics and set(metrics) <= set(samples), title
    grouped = [label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")]
    wanted = {*grouped, *re.findall(r"(\w+)=~?\"", expression)}
    assert wanted and all(wanted <= samples[name] for name in metrics), title


def test_every_metric_is_on_the_dashboard(samples):
    shown = {name for _, expression in QUERIES for name in names(expression)}
    assert {family(name) for name in samples} == {family(name) for name in shown}


def family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def test_legends_and_the_model_variable_use_labels_that_are_there(samples):
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(wanted <= samples[name] for name in names(target["expr"]))
    variable = DASHBOARD["templating"]["list"][1]["query"]["query"]
    name, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", variable).groups()
    assert label in samples[name]


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(x, y) for p in panels for x in columns(p["gridPos"]) for y in rows(p["gridPos"])]
    assert len(set(cells)) == len(cells)


def columns(place: dict[str, int]) -> range:
    return range(place["x"], place["x"] + place["w"])


def rows(place: dict[str, int]) -> range:
    return range(place["y"], place["y"] + place["h"])


def test_compose_mounts_what_is_there_and_opens_ports_to_this_machine_alone():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            assert (FOLDER / volume.split(":")[0]).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (FOLDER / COMPOSE["services"]["leyden"]["build"] / "Dockerfile").exists()
    overlay = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text())
    assert set(overlay["services"]) <= set(COMPOSE["services"])


def test_prometheus_scrapes_the_server_and_grafana_reads_prometheus():
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"][0]
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    source = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    host, port = source["url"].removeprefix("http://").split(":")
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    provider = yaml.safe_load((FOLDER / "provisioning/dashboards/leyden.yaml").read_text())["providers"][0]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounts
