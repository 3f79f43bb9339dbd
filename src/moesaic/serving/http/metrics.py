"""GET /metrics: the meter's counts in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from moesaic.serving.http.engine import Engine
from moesaic.serving.http.meter import Histogram

router = APIRouter()


@router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms; every name begins with `moesaic_`."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


def registry(engine: Engine) -> CollectorRegistry:
    """A registry of this engine alone: two servers in one process do not mix."""
    found = CollectorRegistry(auto_describe=False)
    found.register(_Reader(engine))
    return found


class _Reader(Collector):
    """Reads the meter when it is asked, so counting costs the engine nothing more."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        engine, meter = self.engine, self.engine.meter
        answers = CounterMetricFamily("moesaic_http_requests", "Answers by path and HTTP status.", labels=["path", "status"])
        for (path, status), count in list(meter.answers.items()):
            answers.add_metric([path, str(status)], count)
        yield answers
        jobs = CounterMetricFamily("moesaic_jobs", "Prompts by how they ended.", labels=["outcome"])
        for outcome in ("done", "cancelled", "timed out", "failed", "closed", "refused"):
            jobs.add_metric([outcome.replace(" ", "_")], meter.outcomes[outcome])
        yield jobs
        yield CounterMetricFamily("moesaic_prompt_tokens", "Prompt tokens read.", value=meter.prompt_tokens)
        yield CounterMetricFamily("moesaic_completion_tokens", "Tokens written.", value=meter.completion_tokens)
        yield CounterMetricFamily("moesaic_embedding_tokens", "Tokens embedded.", value=meter.embedding_tokens)
        yield CounterMetricFamily("moesaic_steps", "Calls of the model that wrote tokens.", value=meter.steps)
        yield CounterMetricFamily("moesaic_step_rows", "Rows in those calls, summed.", value=meter.stepped_rows)
        yield GaugeMetricFamily("moesaic_running_answers", "Answers being written.", value=engine.running)
        yield GaugeMetricFamily("moesaic_waiting_jobs", "Prompts that wait for a place.", value=engine.waiting)
        yield GaugeMetricFamily("moesaic_max_answers", "Answers that can be written at a time.", value=engine.max_rows)
        yield _histogram("moesaic_time_to_first_token_seconds", "From request to first token.", meter.first_token)
        yield _histogram("moesaic_time_between_tokens_seconds", "Between tokens of an answer.", meter.between_tokens)
        yield _histogram("moesaic_queue_seconds", "From request to the reading of its prompt.", meter.queue_seconds)
        yield _histogram("moesaic_request_seconds", "From request to its end.", meter.request_seconds)
        if meter.load is not None:
            load = GaugeMetricFamily(
                "moesaic_expert_load_max_over_mean", "The busiest expert's choices over the mean.", labels=["layer"]
            )
            for layer, value in meter.load.imbalance():
                load.add_metric([str(layer)], value)
            yield load


def _histogram(name: str, help: str, counted: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, help)
    family.add_metric([], buckets=counted.cumulative(), sum_value=counted.sum)
    return family
