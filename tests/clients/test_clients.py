"""What real clients make of our answers, and lm-eval's numbers over HTTP beside transformers' own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models/demo"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["langchain", "litellm"])
def test_whole_and_streamed_answers_are_the_same(client, name):
    found = client("several.py", name)
    assert len(found["whole"]) > 20 and found["streamed"] == found["whole"]


def test_instructor_gets_its_model(client):
    animal = client("several.py", "instructor")
    assert set(animal) == {"name", "legs"} and 0 <= animal["legs"] <= 8


def test_the_npm_client(node_client):
    found = node_client("openai_node.mjs")
    assert len(found["whole"]) > 20 and found["streamed"] == found["whole"]
    assert found["tokens"] == [20, 20] and found["plain"]
    assert found["refusal"] == {"status": 400, "param": "temperature"}
    assert found["models"] == ["demo"]


@pytest.fixture
def tasks(tmp_path) -> Path:
    """The tasks, which name their data by its full path."""
    for path in (HERE / "tasks").iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("FOLDER", str(tmp_path)))
    return tmp_path


def test_lm_eval_finds_over_http_what_it_finds_in_transformers(client, tasks):
    found = client("lm_eval_twice.py", MODEL, tasks)
    for task, each in found.items():
        http, own = each["http"], each["transformers"]
        assert http["metrics"] == pytest.approx(own["metrics"], rel=1e-5), task
        assert len(http["answers"]) == len(own["answers"]) > 0
    assert found["leyden_generation"]["http"]["answers"] == found["leyden_generation"]["transformers"]["answers"]
    for mine, theirs in zip(*(found["leyden_choice"][way]["answers"] for way in ("http", "transformers")), strict=True):
        assert [score for score, _ in mine] == pytest.approx([score for score, _ in theirs], abs=1e-3)
        assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in theirs]


def test_guidellm_measures_without_an_error(demo, clients_bin, tmp_path):
    report = tmp_path / "report.json"
    command = [clients_bin / "guidellm", "run", "--backend", f"kind=openai_http,target={demo.url}", "--disable-console"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--profile", "kind=synchronous"]
    command += ["--constraint", "kind=max_requests,count=4", "--tokenizer", f"kind=huggingface_auto,model={MODEL}"]
    command += ["--output", f"kind=json,path={report}"]
    subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, timeout=200, capture_output=True)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 4 and not benchmark["requests"]["errored"]
    assert all(request["output_tokens"] == 16 for request in benchmark["requests"]["successful"])
