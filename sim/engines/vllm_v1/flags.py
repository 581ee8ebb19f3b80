"""The flags of vLLM V1: names, defaults by device, limits, and what it declares of itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.engines.kv_memory import board_gigabytes, is_cpu, kv_cache, shape_of
from sim.engines.vllm_v1.versions import KNOWN_VERSIONS, known_version
from sim.model.errors import BadInput
from sim.model.files.shape import Fail
from sim.model.quantity import MOST, Countable, Size
from sim.model.scenario import Hardware
from sim.model.server import Bounds, Declaration, EngineFlags, Limit, Uniform
from sim.model.warning import Notice, notice

COUNTERS = ("vllm:num_preemptions_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")


class Flags(
    EngineFlags,
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="engine",
    tag="vllm-v1",
):
    """The engine's arguments that decide how it schedules, under its own names; defaults are those of `vllm serve` on a
    GPU of less than 70 GB or an A100, and `on` has those of other devices (engine/arg_utils.py:get_batch_defaults,
    config/*.py).

    The KV cache has `num_gpu_blocks` blocks, of which one is never used, or room for `kv_cache_tokens` tokens (what the
    server logs as its size); without either it is the calibration's, or what fits on the machine. With
    `max_num_queued_reqs` requests in flight another is refused.
    """

    declared: ClassVar[Declaration] = Declaration(
        name="vllm-v1",
        title="vLLM V1",
        family="vllm",
        versions=r"0\.(9|[1-9]\d)\..*|[1-9]\d*\..*",
        aliases=("vllm-openai", "vllm-cpu"),
        flags_from="vllm serve --help (vllm/engine/arg_utils.py, vllm/config/*.py at 0.32.0)",
        told=(
            "version",
            "max_model_len",
            "num_gpu_blocks",
            "block_size",
            "enable_prefix_caching",
            "gpu_memory_utilization",
        ),
        told_at="/version, /v1/models, and vllm:cache_config_info in /metrics",
        decisive=("max_num_batched_tokens", "max_num_seqs"),
        by_device=("max_num_batched_tokens", "max_num_seqs"),
        capacity="kv_cache_tokens",
        forms=("mixed", "affine", "affine_levels"),
        limits=(
            Limit("KV cache", "kv_full", "requests wait for blocks of the KV cache, or for preempted ones"),
            Limit("batch size", "seats_full", "requests wait while max_num_seqs run"),
            Limit("step tokens", "step_full", "requests wait while steps hold max_num_batched_tokens"),
        ),
        turn="the queue is first come, first served",
        refused={
            "speculative_config": "speculative decoding",
            "num_speculative_tokens": "speculative decoding",
            "n": "several answers to one request (n)",
            "best_of": "several answers to one request (best_of)",
            "use_beam_search": "beam search",
            "data_parallel_size": "data parallelism",
            "pipeline_parallel_size": "pipeline parallelism",
            "enable_lora": "LoRA",
            "kv_transfer_config": "disaggregated prefill, or KV offload by a connector",
            "cpu_offload_gb": "offloading of weights",
            "kv_offloading_size": "KV offload",
            "stream_interval": "several tokens an event",
            "max_num_queued_tokens": "a limit of queued tokens",
        },
        counters=COUNTERS,
        arguments={"num_gpu_blocks": "num_gpu_blocks_override"},
        launched=("max_num_batched_tokens", "max_num_seqs"),
        not_arguments=("version", "kv_cache_tokens"),
        image="vllm/vllm-openai:v0.32.0",
    )

    version: str = "0.32.0"
    max_model_len: Size = 4096
    max_num_seqs: Size = 256
    max_num_batched_tokens: Size = 2048
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: Annotated[int, msgspec.Meta(ge=0, le=MOST)] = 0
    long_prefill_token_threshold_adaptive: bool = False
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    max_num_active_seqs: Size | None = None
    scheduler_reserve_full_isl: bool = True
    watermark: Countable = 0.0
    async_scheduling: bool = True
    block_size: Size = 16
    enable_prefix_caching: bool = True
    num_gpu_blocks: Size | None = None
    kv_cache_tokens: Size | Bounds | None = None
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.92
    max_num_queued_reqs: Size | None = None
    performance_mode: Literal["balanced", "interactivity", "throughput"] = "balanced"

    @property
    def permits(self) -> int | None:
        """See `EngineFlags.permits`: in flight are running and waiting requests alike."""
        return self.max_num_queued_reqs

    @property
    def warnings(self) -> list[Notice]:
        """See `EngineFlags.warnings`."""
        rules = known_version(self.version)
        if rules == self.version:
            return []
        return [
            notice(
                "version-unknown",
                f"vLLM {self.version} is not among the versions whose scheduler is known "
                f"({', '.join(KNOWN_VERSIONS)}): it is simulated with the rules of {rules}",
            )
        ]

    @property
    def blocks(self) -> int:
        """`num_gpu_blocks`, one of them never used; `ValueError` where the size of the cache is not settled."""
        if self.num_gpu_blocks is not None:
            return self.num_gpu_blocks
        if isinstance(self.kv_cache_tokens, int):
            return self.kv_cache_tokens // self.block_size
        raise ValueError("the size of the KV cache is not settled yet")

    @property
    def kv_tokens(self) -> int | None:
        """See `EngineFlags.kv_tokens`."""
        settled = self.num_gpu_blocks is not None or isinstance(self.kv_cache_tokens, int)
        return (self.blocks - 1) * self.block_size if settled else None

    @property
    def longest(self) -> str:
        """See `EngineFlags.longest`."""
        return f"prompts of less than {self.max_model_len} tokens (server.max_model_len), and answers of no more"

    def on(self, machine: Hardware, written: Collection[str]) -> Flags:
        """See `EngineFlags.on`."""
        defaults: dict[str, Any] = {}
        memory, shape = board_gigabytes(machine.gpu) or 0.0, shape_of(machine.model)
        if is_cpu(machine.gpu):
            shards = machine.tensor_parallel or 1
            defaults |= {"max_num_batched_tokens": 2048 * shards, "max_num_seqs": 128 * shards, "block_size": 128}
            defaults["async_scheduling"] = False  # whatever was written: the platform forces it off
        elif memory >= 160:
            defaults |= {"max_num_batched_tokens": 16384, "max_num_seqs": 1024}
        elif memory >= 70 and "a100" not in (machine.gpu or "").lower():
            defaults |= {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
        rules = KNOWN_VERSIONS.index(known_version(self.version))
        if rules < KNOWN_VERSIONS.index("0.20.2"):
            defaults["gpu_memory_utilization"] = 0.9
        if rules < KNOWN_VERSIONS.index("0.14.1"):
            defaults["async_scheduling"] = False
        if shape is not None:
            defaults["max_model_len"] = shape.longest
        forced = {"async_scheduling"} if is_cpu(machine.gpu) else set()
        found = msgspec.structs.replace(
            self, **{name: value for name, value in defaults.items() if name not in written or name in forced}
        )
        tokens, seqs = found.max_num_batched_tokens, found.max_num_seqs
        many = 2 if self.performance_mode == "throughput" else 1
        if "max_num_seqs" not in written:
            seqs *= many
        if "max_num_batched_tokens" not in written:
            tokens = min(tokens * many, seqs * found.max_model_len)
            tokens = tokens if found.enable_chunked_prefill else max(tokens, found.max_model_len)
        if "max_num_seqs" not in written:
            seqs = min(seqs, tokens)
        return msgspec.structs.replace(found, max_num_batched_tokens=tokens, max_num_seqs=seqs)

    @property
    def cuts(self) -> bool:
        """Whether an answer is cut silently where it would outgrow max_model_len together with its prompt.

        Up to 0.25.1 such a request is refused (0.9.2 to 0.17.1: entrypoints/openai/serving_engine.py:_validate_input
        and renderers/params.py; 0.25.1: renderers/params.py:max_input_tokens subtracts what may be generated).
        """
        return KNOWN_VERSIONS.index(known_version(self.version)) >= KNOWN_VERSIONS.index("0.32.0")

    def as_told(self, told: Mapping[str, Any]) -> Flags:
        """See `EngineFlags.as_told`: of two sizes of the KV cache the server's own wins, as it is exact."""
        other = {} if "num_gpu_blocks" not in told else {"kv_cache_tokens": None}
        return msgspec.structs.replace(self, **other | dict(told))

    def allowed(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """See `EngineFlags.allowed`: a request that would outgrow max_model_len is cut silently, or refused."""
        if self.refuses(prompt_tokens, max_new_tokens):
            return 0
        return min(max_new_tokens, self.max_model_len - prompt_tokens)

    def refuses(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """See `EngineFlags.refuses`; an answer that is too long only together with its prompt is cut if `cuts`."""
        together = 0 if self.cuts else prompt_tokens
        return prompt_tokens >= self.max_model_len or together + max_new_tokens > self.max_model_len

    def check(self, fail: Fail) -> None:
        """See `EngineFlags.check`."""
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise fail(
                ("max_num_batched_tokens",),
                f"expected at least max_num_seqs ({self.max_num_seqs}), found {self.max_num_batched_tokens}",
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise fail(
                ("max_num_batched_tokens",),
                f"expected at least max_model_len ({self.max_model_len}) without chunked prefill, found "
                f"{self.max_num_batched_tokens}",
            )
        if self.num_gpu_blocks is not None and self.kv_cache_tokens is not None:
            raise fail(("kv_cache_tokens",), "expected either num_gpu_blocks or kv_cache_tokens, found both")
        room = self.kv_tokens
        if room is not None and room < self.max_model_len:
            key = "num_gpu_blocks" if self.num_gpu_blocks is not None else "kv_cache_tokens"
            raise fail(
                (key,), f"expected room for max_model_len ({self.max_model_len}) tokens, found room for {max(room, 0)}"
            )

    def settled(self, capacity: float | None, uniform: Uniform, machine: Hardware) -> Flags:
        """See `EngineFlags.settled`."""
        tokens = self.kv_cache_tokens
        if tokens is None and self.num_gpu_blocks is None and capacity is None:
            tokens = kv_cache(
                machine.model,
                machine.gpu,
                machine.tensor_parallel or machine.gpus or 1,
                self.gpu_memory_utilization,
                self.max_num_batched_tokens,
                self.max_num_seqs,
            )
            least = self.max_model_len + 2 * self.block_size  # or the server would not have started
            if tokens is not None and tokens.high < least:
                raise BadInput(
                    f"expected at most {tokens.high}, found {self.max_model_len}: the KV cache that fits beside the "
                    "weights has no room for one such request, and vLLM would not start",
                    key="server.max_model_len",
                )
            if tokens is not None:
                tokens = Bounds(low=max(tokens.low, least), high=tokens.high)
        if isinstance(tokens, Bounds):
            inside = capacity is not None and tokens.low <= capacity <= tokens.high
            tokens = round(capacity) if inside and capacity is not None else uniform(tokens.low, tokens.high)
        elif self.num_gpu_blocks is None and tokens is None:
            if capacity is None:
                raise BadInput(
                    "expected a number of tokens here or in the calibration, or a machine whose model and gpu are "
                    "known to leave room (the server logs its KV cache size; num_gpu_blocks will do, too)",
                    key="server.kv_cache_tokens",
                )
            tokens = round(capacity)
        return msgspec.structs.replace(self, kv_cache_tokens=tokens)

    def widened(self, prompt_tokens: int, total_tokens: int, users: int, given: set[str]) -> Flags:
        """See `EngineFlags.widened`."""
        if "max_model_len" in given:
            return self
        return msgspec.structs.replace(self, max_model_len=max(self.max_model_len, total_tokens))

    def full(self, steps: Mapping[str, NDArray[Any]], prompt_tokens: int, max_new_tokens: int) -> dict[str, float]:
        """The share of the window's time in which another usual prompt would not have had its blocks, in which
        max_num_seqs requests ran, and in which steps held max_num_batched_tokens tokens."""
        seconds = np.where(steps["inside"], steps["end"] - steps["start"], 0.0)
        each = seconds / max(1e-9, seconds.sum())
        room = (self.blocks - 1) * self.block_size - steps["held"]
        tokens = steps["prefill_tokens"] + steps["decode_sequences"]
        full = {
            "kv_full": room < prompt_tokens,
            "seats_full": steps["decode_sequences"] >= 0.99 * self.max_num_seqs,  # some are still being prefilled
            "step_full": tokens >= self.max_num_batched_tokens,
        }
        return {name: float(each[rows].sum()) for name, rows in full.items()}
