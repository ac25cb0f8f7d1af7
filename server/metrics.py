"""Prometheus metrics under vLLM's names. The engine's counters are read at scrape time; latencies are measured here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..engine.boundary.client import EngineClient
from ..engine.outputs import RequestOutput

# Seconds. A token takes milliseconds, a queued long prompt may take minutes.
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)
FINISHED_REASONS = ("stop", "length", "abort", "error")


class ServerMetrics:
    """All metrics of one app in a registry of its own, so that two apps in one process do not collide."""

    def __init__(self, client: EngineClient, prefix: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(client, prefix, model_name))
        self._prefix = prefix
        self._model_name = model_name
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two outputs of one sequence.", INTER_TOKEN_BUCKETS
        )
        self.whole_request = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From the engine's queue to a sequence's first step.", FIRST_TOKEN_BUCKETS
        )
        finished = self._counter("request_success", "Sequences ended, by reason.", "finished_reason")
        self._finished = {reason: finished.labels(model_name, reason) for reason in FINISHED_REASONS}
        self._refused = self._counter("request_refused", "Requests answered with an error, by reason.", "reason")
        self._ignored = self._counter("request_ignored_parameters", "Requests of which fields were left out.")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"{self._prefix}:{name}"
        metric = Histogram(full, text, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        full = f"{self._prefix}:{name}"
        return Counter(full, text, ["model_name", *labels], registry=self.registry)

    def count_refusal(self, reason: str) -> None:
        self._refused.labels(self._model_name, reason).inc()

    def count_ignored(self) -> None:
        self._ignored.labels(self._model_name).inc()

    def count_finished(self, reason: str) -> None:
        self._finished[reason].inc()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class SequenceTimer:
    """Measures the latencies of one sequence, from its hand-over to the engine on."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self.started = time.perf_counter()
        self.last_token: float | None = None
        self.finish_reason: str | None = None

    def observe(self, output: RequestOutput) -> None:
        now = time.perf_counter()
        if output.queue_seconds is not None:
            self.metrics.queue_time.observe(output.queue_seconds)
        if output.token_ids:
            if self.last_token is None:
                self.metrics.first_token.observe(now - self.started)
            else:
                self.metrics.inter_token.observe(now - self.last_token)
            self.last_token = now
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.metrics.whole_request.observe(now - self.started)

    def close(self, reason_without_end: str | None) -> None:
        """Count the sequence by the finish reason of its last output, else by the one given; None: it never began."""
        reason = self.finish_reason or reason_without_end
        if reason is not None:
            self.metrics.count_finished(reason)


class EngineCollector(Collector):
    """The engine's latest counters as metrics, made at each scrape."""

    def __init__(self, client: EngineClient, prefix: str, model_name: str) -> None:
        self.client = client
        self.prefix = prefix
        self.model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats, info = self.client.stats, self.client.info
        yield self._gauge("num_requests_running", "Sequences in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue.", stats.num_waiting)
        kv_share = stats.kv_blocks_used / info.num_kv_blocks if info.num_kv_blocks else 0.0
        yield self._gauge("kv_cache_usage_perc", "KV blocks of sequences; 1 means all.", kv_share)
        yield self._gauge("state_slots_used", "Recurrent state slots in use.", stats.state_slots_used)
        yield self._gauge("state_slots_total", "Recurrent state slots there are.", info.num_state_slots)
        yield self._gauge("prefix_cache_blocks", "KV blocks of the prefix cache alone.", stats.kv_blocks_cached)
        used = {"device": stats.snapshots_used, "host": stats.host_snapshots_used}
        yield self._gauges("snapshots_used", "States in the prefix cache.", "tier", used)
        total = {"device": info.num_snapshots, "host": info.num_host_snapshots}
        yield self._gauges("snapshots_total", "States it has room for.", "tier", total)
        looked_up, found = stats.prefix_cache_queries_total, stats.prefix_cache_hits_total
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", looked_up)
        yield self._counter("prefix_cache_hits", "Those of them found there.", found)
        drafted, accepted = stats.draft_tokens_total, stats.accepted_tokens_total
        yield self._counter("spec_decode_num_draft_tokens", "Drafts of speculative decoding.", drafted)
        yield self._counter("spec_decode_num_accepted_tokens", "Those of them that were right.", accepted)
        yield self._counter("prompt_tokens", "Prompt tokens, cached ones included.", stats.prompt_tokens_total)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens_total)
        yield self._counter("num_preemptions", "Sequences set back to the queue.", stats.preemptions_total)
        steps = stats.steps_total
        yield self._summary("engine_step_seconds", "Whole engine steps.", steps, stats.step_seconds_total)
        yield self._summary("schedule_seconds", "Scheduling in a step.", steps, stats.schedule_seconds_total)
        yield self._summary("engine_host_seconds", "A step without its waits.", steps, stats.host_seconds_total)
        decodes, host = stats.decode_steps_total, stats.decode_host_seconds_total
        yield self._summary("engine_decode_host_seconds", "The same of steps that only decode.", decodes, host)
        yield from self._memory()
        yield self._cache_config()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=["model_name", label])
        for label_value, value in values.items():
            family.add_metric([self.model_name, label_value], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self.prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _summary(self, name: str, text: str, count: int, total: float) -> Metric:
        family = SummaryMetricFamily(f"{self.prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self.model_name], count_value=count, sum_value=total)
        return family

    def _memory(self) -> Iterator[Metric]:
        use = self.client.info.memory
        yield self._gauge("memory_budget_bytes", "Device memory that the settings give.", use.total)
        text = "Device memory by what it is for, as measured at start."
        yield self._gauges("memory_bytes", text, "kind", {**use.by_kind(), "free": max(0, use.unassigned)})

    def _cache_config(self) -> Metric:
        info = self.client.info
        labels = {
            "model_name": self.model_name,
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_kv_blocks),
            "num_state_slots": str(info.num_state_slots),
            "state_dtype": info.state_dtype,
            "linear_backend": info.linear_backend,
        }
        family = GaugeMetricFamily(f"{self.prefix}:cache_config_info", "Memory pools.", labels=list(labels))
        family.add_metric(list(labels.values()), 1.0)
        return family
