from __future__ import annotations

import itertools

import pytest
from leyden.engine.messages import EngineStats
from prometheus_client.parser import text_string_to_metric_families


async def scrape(client):
    """(metric name, labels without model_name) -> value, after a strict parse."""
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            samples[sample.name, tuple(sorted(labels.items()))] = sample.value
    return samples


async def test_the_engines_numbers_appear_under_vllms_names(client, engine):
    engine.stats = EngineStats(
        num_running=3,
        num_waiting=2,
        state_slots_used=4,
        kv_blocks_used=5,
        kv_blocks_cached=2,
        snapshots_used=3,
        host_snapshots_used=1,
        prefix_cache_queries_total=60,
        prefix_cache_hits_total=40,
        draft_tokens_total=30,
        accepted_tokens_total=20,
        prompt_tokens_total=70,
        generation_tokens_total=80,
        preemptions_total=1,
        steps_total=9,
        step_seconds_total=1.5,
        schedule_seconds_total=0.25,
        host_seconds_total=0.75,
        decode_steps_total=6,
        decode_host_seconds_total=0.5,
    )
    samples = await scrape(client)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.5,
        "state_slots_used": 4,
        "state_slots_total": 8,
        "prefix_cache_blocks": 2,
        "prefix_cache_queries_total": 60,
        "prefix_cache_hits_total": 40,
        "spec_decode_num_draft_tokens_total": 30,
        "spec_decode_num_accepted_tokens_total": 20,
        "prompt_tokens_total": 70,
        "generation_tokens_total": 80,
        "num_preemptions_total": 1,
        "engine_step_seconds_count": 9,
        "engine_step_seconds_sum": 1.5,
        "schedule_seconds_sum": 0.25,
        "engine_host_seconds_sum": 0.75,
        "engine_decode_host_seconds_count": 6,
        "engine_decode_host_seconds_sum": 0.5,
    }
    assert {name: samples[f"leyden:{name}", ()] for name in expected} == expected
    by_tier = [
        samples[f"leyden:snapshots_{name}", (("tier", tier),)]
        for name in ("used", "total")
        for tier in ("device", "host")
    ]
    assert by_tier == [3, 1, 6, 4]
    info = next(dict(labels) for name, labels in samples if name == "leyden:cache_config_info")
    assert (info["block_size"], info["num_gpu_blocks"]) == ("16", "10")


async def test_memory_is_told_by_kind_and_adds_up_to_the_budget(client, engine):
    samples = await scrape(client)
    kinds = {dict(labels)["kind"]: n for (name, labels), n in samples.items() if name == "leyden:memory_bytes"}
    assert kinds == {
        "weights": 400,
        "state": 100,
        "kv": 200,
        "snapshots": 0,
        "sampler": 10,
        "workspace": 50,
        "graphs": 30,
        "other": 60,
        "free": 150,
    }
    assert sum(kinds.values()) == samples["leyden:memory_budget_bytes", ()] == 1000
    engine.info.memory.kv += 151
    assert (await scrape(client))["leyden:memory_bytes", (("kind", "free"),)] == 0, "never negative"


async def test_the_prefix_is_a_setting(make_client):
    client = make_client(metrics_prefix="vllm")
    assert ("vllm:num_requests_running", ()) in await scrape(client)


async def test_latencies_and_reasons_are_counted_per_sequence(client, complete):
    await complete(n=2)
    await complete(max_tokens=3, stream=True)
    samples = await scrape(client)
    assert samples["leyden:time_to_first_token_seconds_count", ()] == 3
    assert samples["leyden:e2e_request_latency_seconds_count", ()] == 3
    assert samples["leyden:inter_token_latency_seconds_count", ()] == 12 + 12 + 2
    assert samples["leyden:request_queue_time_seconds_count", ()] == 3
    assert samples["leyden:request_queue_time_seconds_sum", ()] == 3 * 0.25
    assert samples["leyden:request_success_total", (("finished_reason", "stop"),)] == 2
    assert samples["leyden:request_success_total", (("finished_reason", "length"),)] == 1


async def test_latencies_of_a_sequence_add_up_to_the_time_of_its_last_token(client, complete, monkeypatch):
    """By a clock that goes on by a second whenever it is asked, which is once at the start and once per output."""
    clock = itertools.count(100.0)
    monkeypatch.setattr("leyden.server.metrics.time.perf_counter", lambda: next(clock))
    num_outputs = 7
    await complete(max_tokens=num_outputs)
    monkeypatch.undo()
    samples = await scrape(client)
    assert samples["leyden:time_to_first_token_seconds_sum", ()] == 1.0
    assert samples["leyden:inter_token_latency_seconds_sum", ()] == num_outputs - 1
    assert samples["leyden:e2e_request_latency_seconds_sum", ()] == num_outputs


@pytest.mark.parametrize(
    ("fault", "reason"), [("die_after", "error"), ("fail_after", "error"), ("abort_after", "abort")]
)
async def test_failed_sequences_are_counted_as_such(client, complete, engine, fault, reason):
    setattr(engine, fault, 2)
    await complete()
    assert (await scrape(client))["leyden:request_success_total", (("finished_reason", reason),)] == 1


async def test_refusals_are_counted_by_reason_and_never_by_user_input(client, complete, engine):
    await complete(n="evil label")
    await complete(best_of=2)
    await complete(model="other")
    await complete(prompt=[5] * 500)
    await client.get("/nowhere")
    engine.queue_bound = 0
    await complete()
    samples = await scrape(client)
    counts = {
        dict(labels)["reason"]: n for (name, labels), n in samples.items() if name == "leyden:request_refused_total"
    }
    assert counts == {
        "invalid_request_error": 1,
        "unsupported_parameter": 1,
        "model_not_found": 1,
        "context_length_exceeded": 1,
        "unknown_url": 1,
        "rate_limit_exceeded": 1,
    }


async def test_a_sequence_that_was_never_admitted_has_no_end(client, complete, engine):
    engine.queue_bound = 1
    await complete(n=2)
    samples = await scrape(client)
    ends = {
        dict(labels)["finished_reason"]: n for (name, labels), n in samples.items() if name.endswith("success_total")
    }
    assert ends == {"stop": 0, "length": 0, "abort": 1, "error": 0}


async def test_requests_with_ignored_fields_are_counted(client, complete):
    await complete(router_hint=1)
    assert (await scrape(client))["leyden:request_ignored_parameters_total", ()] == 1


async def test_head_of_metrics_is_answered(client):
    assert (await client.head("/metrics")).status_code == 200
