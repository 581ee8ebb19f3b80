"""The metrics of vLLM, by its names, with its buckets and meanings: vllm/v1/metrics/loggers.py, buckets.py and stats.py
at 0.32.0. Left out are counters of what is not simulated (`external_prefix_cache`, `mm_cache`, `estimated_`), the
`_created` times, and the series of the process and of its HTTP server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from measure.standin.exposition import Exposition
from sim.engines.engine import Engine, Outcome, Plan, Scheduled
from sim.engines.vllm_v1 import Flags
from sim.model.request import Request

# vllm/v1/metrics/buckets.py
TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
TTFT += [160.0, 640.0, 2560.0]
ITL = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
REQUEST = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0]
REQUEST += [960.0, 1920.0, 7680.0]
ITERATION = [1.0, 8.0, *(float(1 << k) for k in range(4, 15))]
N = [1.0, 2.0, 5.0, 10.0, 20.0]
PREEMPTIONS = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0]

REASONS = ("stop", "length", "abort", "error", "repetition")  # vllm/v1/engine/__init__.py: FinishReason
REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens")
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
COUNTERS = (
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
)
LENGTHS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
)
DURATIONS = (
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)


@dataclass(eq=False)
class Group:
    """The `n` answers to one prompt."""

    n: int
    left: int = field(init=False)  # answers that have not ended
    most_tokens: int = 0

    def __post_init__(self) -> None:
        self.left = self.n


@dataclass
class Timeline:
    """Times of a request, `perf_counter` seconds."""

    arrived: float
    group: Group
    scheduled: float | None = None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    cached: int = 0
    preemptions: int = 0
    uncounted: int = 0  # preemptions since its last token


class VllmMetrics(Exposition):
    """See `realtime.Metrics`.

    A preemption is counted when the request next emits a token, a prompt with its first token, including what the cache
    held of it. `iteration_tokens_total` has one observation for each step that delivered a token, without what the
    cache held.
    """

    def __init__(self, flags: Flags, model: str):
        lengths = [float(m * 10**e) for e in range(7) for m in (1, 2, 5) if m * 10**e <= flags.max_model_len]
        buckets = {
            "vllm:time_to_first_token_seconds": TTFT,
            "vllm:inter_token_latency_seconds": ITL,
            "vllm:request_time_per_output_token_seconds": ITL,
            "vllm:iteration_tokens_total": ITERATION,
            "vllm:request_params_n": N,
            "vllm:request_num_preemptions": PREEMPTIONS,
            **{f"vllm:{name}": lengths for name in LENGTHS},
        }
        engine, served = 'engine="0"', f'model_name="{model}"'
        others = {"vllm:cache_config_info": (engine,), "vllm:admission_rejections_total": (served,)}
        super().__init__(buckets, REQUEST, (engine, served), others)
        self._requests: dict[Request, Timeline] = {}
        self._counted: dict[str, float] = {}
        for name in COUNTERS:
            self.count(f"vllm:{name}_total", by=0)
        for name, label, values in (
            ("request_success", "finished_reason", REASONS),
            ("admission_rejections", "reason", REJECTIONS),
            ("prompt_tokens_by_source", "source", SOURCES),
        ):
            for value in values:
                self.count(f"vllm:{name}_total", label, value, 0)
        for name in (*buckets, *(f"vllm:{name}" for name in DURATIONS)):
            self.histogram(name)
        for state in ("awake", "weights_offloaded", "discard_all"):
            self.gauge("vllm:engine_sleep_state", state == "awake", f'sleep_state="{state}"')
        blocks = flags.blocks
        info = {
            "block_size": flags.block_size,
            "enable_prefix_caching": flags.enable_prefix_caching,
            "gpu_memory_utilization": flags.gpu_memory_utilization,
            "kv_cache_max_concurrency": blocks * flags.block_size / flags.max_model_len,
            "kv_cache_size_tokens": blocks * flags.block_size,  # with the one that is never used
            "num_gpu_blocks": blocks,
        }
        self.gauge("vllm:cache_config_info", 1, *(f'{name}="{value}"' for name, value in info.items()))

    @property
    def prefilling_tokens(self) -> int:
        """Prompt tokens of the requests without a first token."""
        return sum(request.prompt_tokens for request, its in self._requests.items() if its.first is None)

    def arrived(self, request: Request, at: float, group: Group) -> None:
        """A request was accepted that arrived at `at`."""
        self._requests[request] = Timeline(at, group)

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
                its.uncounted += 1
                its.preemptions += 1
        for request, tokens in delivered:
            iteration += tokens
            self.count("vllm:generation_tokens_total", by=tokens)
            its = self._requests.get(request)
            if its is None:  # its client left with this very token
                continue
            if its.first is None:
                its.first = now
                computed = request.prompt_tokens - its.cached
                iteration += computed
                self.count("vllm:prompt_tokens_total", by=request.prompt_tokens)
                self.count("vllm:prompt_tokens_cached_total", by=its.cached)
                self.count("vllm:prompt_tokens_by_source_total", "source", "local_compute", computed)
                self.count("vllm:prompt_tokens_by_source_total", "source", "local_cache_hit", its.cached)
                self.observe("vllm:time_to_first_token_seconds", now - its.arrived)
            else:
                self.observe("vllm:inter_token_latency_seconds", now - its.last)
            self.count("vllm:num_preemptions_total", by=its.uncounted)
            its.uncounted, its.last, its.tokens = 0, now, its.tokens + tokens
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
            ("request_time_per_output_token_seconds", (its.last - its.first) / max(1, its.tokens - 1)),
            ("request_num_preemptions", its.preemptions),
            ("request_prompt_tokens", request.prompt_tokens),
            ("request_prefill_kv_computed_tokens", request.prompt_tokens - its.cached),
            ("request_generation_tokens", its.tokens),
            ("request_params_max_tokens", request.max_new_tokens),
        ):
            self.observe(f"vllm:{name}", value)
        group = its.group
        group.left, group.most_tokens = group.left - 1, max(group.most_tokens, its.tokens)
        if not group.left:  # once for each prompt
            self.observe("vllm:request_max_num_generation_tokens", group.most_tokens)
            self.observe("vllm:request_params_n", group.n)
