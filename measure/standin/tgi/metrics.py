"""The metrics of TGI 0.9.4, by its names and with its buckets (router/src/server.rs:593-634)."""

from __future__ import annotations

from collections.abc import Sequence

from measure.standin.exposition import Exposition
from sim.engines.engine import Engine, Outcome, Plan, Scheduled
from sim.model.request import Request

DURATION_BUCKETS = [0.0001 * 1.5**k for k in range(1, 36)]


class TgiMetrics(Exposition):
    """See `realtime.Metrics`."""

    def __init__(self, max_input_length: int, max_total_tokens: int):
        tokens = [max_total_tokens / 100 * k for k in range(1, 101)]
        buckets = {
            "tgi_request_input_length": [max_input_length / 100 * k for k in range(1, 101)],
            "tgi_request_generated_tokens": tokens,
            "tgi_request_max_new_tokens": tokens,
            "tgi_batch_next_size": [float(k) for k in range(1, 1025)],
        }
        super().__init__(buckets, DURATION_BUCKETS)
        self._counted: dict[str, float] = {}

    def refresh(self, engine: Engine) -> None:
        """See `realtime.Metrics.refresh`."""
        state = engine.state()
        self.gauge("tgi_queue_size", state.waiting)
        self.gauge("tgi_batch_current_size", state.running)
        self.gauge("tgi_batch_current_max_tokens", state.kv_used)
        for name, value in engine.counters().items():
            series, _, label = name.partition("{")
            key, _, of = label.rstrip("}").partition("=")
            if more := value - self._counted.get(name, 0):
                self.count(series, key, of.strip('"'), more)
            self._counted[name] = value

    def scheduled(self, scheduled: Scheduled) -> None:
        """See `realtime.Metrics.scheduled`."""

    def step(self, plan: Plan, outcome: Outcome, delivered: Sequence[tuple[Request, int]], seconds: float) -> None:
        """See `realtime.Metrics.step`."""
        kind = "decode" if plan.work.decode_sequences else "prefill"
        if kind == "prefill":
            self.observe("tgi_batch_next_size", plan.work.prefill_sequences)
        self.count("tgi_batch_inference_count", "method", kind)
        self.count("tgi_batch_inference_success", "method", kind)
        self.observe("tgi_batch_inference_duration", seconds, "method", kind)
