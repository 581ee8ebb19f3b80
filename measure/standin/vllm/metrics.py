"""The metrics of vLLM, by its names, with its buckets and meanings (vllm/v1/metrics/loggers.py, stats.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from measure.standin.exposition import Exposition
from sim.engines.engine import Engine, Outcome, Plan, Scheduled
from sim.engines.vllm_v1_flags import Flags
from sim.model.request import Request

TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
ITL = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
REQUEST = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0]
ITERATION = [1.0, 8.0, *(float(1 << k) for k in range(4, 15))]
REASONS = ("stop", "length", "abort", "error")
COUNTERS = (
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
)


@dataclass
class Timeline:
    """Times of a request, `perf_counter` seconds."""

    arrived: float
    scheduled: float | None = None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    cached: int = 0
    preemptions: int = 0  # since its last token


class VllmMetrics(Exposition):
    """See `realtime.Metrics`.

    A preemption is counted when the request next emits a token, a prompt with its first token, including what the cache
    held of it. `iteration_tokens_total` has one observation for each step that delivered a token.
    """

    def __init__(self, flags: Flags, model: str):
        lengths = [float(m * 10**e) for e in range(7) for m in (1, 2, 5) if m * 10**e <= flags.max_model_len]
        buckets = {
            "vllm:time_to_first_token_seconds": TTFT,
            "vllm:inter_token_latency_seconds": ITL,
            "vllm:request_time_per_output_token_seconds": ITL,
            "vllm:iteration_tokens_total": ITERATION,
        }
        buckets |= {f"vllm:request_{name}": lengths for name in ("prompt_tokens", "generation_tokens")}
        buckets["vllm:request_params_max_tokens"] = lengths
        super().__init__(buckets, REQUEST, f'engine="0",model_name="{model}"')
        self._requests: dict[Request, Timeline] = {}
        self._counted: dict[str, float] = {}
        for name in COUNTERS:
            self.count(f"vllm:{name}_total", by=0)
        for reason in REASONS:
            self.count("vllm:request_success_total", "finished_reason", reason, 0)
        blocks = flags.blocks
        info = {
            "block_size": flags.block_size,
            "enable_prefix_caching": flags.enable_prefix_caching,
            "kv_cache_size_tokens": (blocks - 1) * flags.block_size,
            "num_gpu_blocks": blocks,
        }
        self.gauge("vllm:cache_config_info", 1, ",".join(f'{name}="{value}"' for name, value in info.items()))

    @property
    def prefilling_tokens(self) -> int:
        """Prompt tokens of the requests without a first token."""
        return sum(request.prompt_tokens for request, its in self._requests.items() if its.first is None)

    def arrived(self, request: Request, at: float) -> None:
        """A request was accepted that arrived at `at`."""
        self._requests[request] = Timeline(at)

    def left(self, request: Request) -> None:
        """A request will get no more tokens: its client has left, or it failed."""
        self._requests.pop(request, None)

    def rejected(self, reason: str) -> None:
        """A request was refused because too much is queued."""
        self.count("vllm:admission_rejections_total", "reason", reason)

    def refresh(self, engine: Engine) -> None:
        """See `realtime.Metrics.refresh`."""
        state = engine.state()
        self.gauge("vllm:num_requests_running", state.running)
        self.gauge("vllm:num_requests_waiting", state.waiting)
        self.gauge("vllm:num_requests_waiting_by_reason", state.waiting, 'reason="capacity"')
        self.gauge("vllm:num_requests_waiting_by_reason", 0, 'reason="deferred"')
        self.gauge("vllm:kv_cache_usage_perc", state.kv_used / max(1, state.kv_used + state.kv_free))
        for name, value in engine.counters().items():
            if "preemptions" not in name:
                self.count(name, by=value - self._counted.get(name, 0))
                self._counted[name] = value

    def scheduled(self, scheduled: Scheduled) -> None:
        """See `realtime.Metrics.scheduled`."""
        for row in scheduled.rows:
            its = self._requests.get(row.request)
            if its is not None and its.scheduled is None:
                its.scheduled, its.cached = perf_counter(), row.computed

    def step(self, plan: Plan, outcome: Outcome, delivered: Sequence[tuple[Request, int]], seconds: float) -> None:
        """See `realtime.Metrics.step`."""
        now, iteration = perf_counter(), 0
        for request in plan.preempted:
            if (its := self._requests.get(request)) is not None:
                its.preemptions += 1
        for request, tokens in delivered:
            iteration += tokens
            self.count("vllm:generation_tokens_total", by=tokens)
            its = self._requests.get(request)
            if its is None:  # its client left with this very token
                continue
            if its.first is None:
                its.first = now
                iteration += request.prompt_tokens
                self.count("vllm:prompt_tokens_total", by=request.prompt_tokens)
                self.count("vllm:prompt_tokens_cached_total", by=its.cached)
                self.observe("vllm:time_to_first_token_seconds", now - its.arrived)
            else:
                self.observe("vllm:inter_token_latency_seconds", now - its.last)
            self.count("vllm:num_preemptions_total", by=its.preemptions)
            its.preemptions, its.last, its.tokens = 0, now, its.tokens + tokens
        for request in outcome.finished:
            self._finish(request)
        if iteration:
            self.observe("vllm:iteration_tokens_total", iteration)

    def _finish(self, request: Request) -> None:
        its = self._requests.pop(request, None)
        if its is None or its.first is None:
            return
        reason = "length" if request.output_tokens == request.max_new_tokens else "stop"
        self.count("vllm:request_success_total", "finished_reason", reason)
        scheduled = its.scheduled or its.arrived
        for name, value in (
            ("e2e_request_latency_seconds", its.last - its.arrived),
            ("request_queue_time_seconds", scheduled - its.arrived),
            ("request_prefill_time_seconds", its.first - scheduled),
            ("request_decode_time_seconds", its.last - its.first),
            ("request_inference_time_seconds", its.last - scheduled),
            ("request_prompt_tokens", request.prompt_tokens),
            ("request_generation_tokens", its.tokens),
            ("request_params_max_tokens", request.max_new_tokens),
        ):
            self.observe(f"vllm:{name}", value)
        if its.tokens > 1:
            mean = (its.last - its.first) / (its.tokens - 1)
            self.observe("vllm:request_time_per_output_token_seconds", mean)
