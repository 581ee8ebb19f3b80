"""How a server of TGI 0.9.4 is configured, what it refuses, and what it declares of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.engines.tgi_0_9_4.entry import ceil_block
from sim.model.errors import BadInput, CannotFit
from sim.model.files.shape import Fail
from sim.model.quantity import Countable, Size
from sim.model.scenario import Hardware
from sim.model.server import Bounds, Declaration, EngineFlags, Limit, Uniform

_CONCATENATED = 'tgi_batch_concat{{reason="{}"}}'
COUNTERS = (*map(_CONCATENATED.format, ("backpressure", "wait_exceeded")), 'tgi_request_failure{err="dropped"}')


class Flags(
    EngineFlags,
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="engine",
    tag="tgi-0.9.4",
):
    """How the router is configured, under the launcher's own names and with its defaults.

    `max_batch_total_tokens` is what the server would answer at `/info`: flash models ignore the flag and take what
    their warm-up finds free. Absent, it is the calibration's; as `Bounds`, it is drawn.
    """

    declared: ClassVar[Declaration] = Declaration(
        name="tgi-0.9.4",
        title="TGI 0.9.4",
        family="tgi",
        versions=r"0\.9\.4",
        aliases=("text-generation-inference",),
        flags_from="text-generation-launcher --help (launcher/src/main.rs:64-282 at the tag v0.9.4)",
        # not max_batch_prefill_tokens, not requires_padding (router/src/lib.rs)
        told=(
            "max_batch_total_tokens",
            "max_input_length",
            "max_total_tokens",
            "waiting_served_ratio",
            "max_waiting_tokens",
            "max_concurrent_requests",
        ),
        told_at="/info",
        # who waits, and for how long, follows from these; a wrong prefill budget moved p95 by half
        decisive=("max_batch_prefill_tokens", "waiting_served_ratio", "max_waiting_tokens"),
        capacity="max_batch_total_tokens",
        forms=("affine", "affine_levels", "padded", "levels"),
        limits=(
            Limit("token budget", "budget_full", "requests wait for room in max_batch_total_tokens"),
            Limit("prefill budget", "prefill_full", "requests wait while max_batch_prefill_tokens is full"),
        ),
        turn="waiting_served_ratio, max_waiting_tokens",
        counters=COUNTERS,
        launched=(
            "max_batch_prefill_tokens",
            "max_batch_total_tokens",
            "max_input_length",
            "max_total_tokens",
            "waiting_served_ratio",
            "max_waiting_tokens",
            "max_concurrent_requests",
        ),
        not_arguments=("requires_padding",),
        model_argument="--model-id",
        host_argument="--hostname",
        shards_argument="--num-shard",
        refused_status=422,
        overloaded_status=429,
        image="ghcr.io/huggingface/text-generation-inference:0.9.4",
        tokenizer_workers=2,  # threads that count tokens, each of one prompt at a time (router/src/validation.rs:34-48)
    )

    max_batch_prefill_tokens: Size = 4096
    max_batch_total_tokens: Size | Bounds | None = None
    max_input_length: Size = 1024
    max_total_tokens: Size = 2048
    waiting_served_ratio: Countable = 1.2
    max_waiting_tokens: Size = 20
    max_concurrent_requests: Size = 128
    requires_padding: bool = False

    @property
    def permits(self) -> int | None:
        """See `EngineFlags.permits`."""
        return self.max_concurrent_requests

    @property
    def pads(self) -> bool:
        """See `EngineFlags.pads`."""
        return self.requires_padding

    @property
    def kv_tokens(self) -> int | None:
        """See `EngineFlags.kv_tokens`."""
        return self.max_batch_total_tokens if isinstance(self.max_batch_total_tokens, int) else None

    @property
    def token_budget(self) -> int:
        """`max_batch_total_tokens` as one number; a CPU server without the flag takes the router's own default."""
        if isinstance(self.max_batch_total_tokens, int):
            return self.max_batch_total_tokens
        if self.max_batch_total_tokens is None and self.requires_padding:  # router/src/main.rs:209-239
            return max(16000, self.max_total_tokens, self.max_batch_prefill_tokens)
        raise ValueError("max_batch_total_tokens is not settled yet")

    @property
    def longest(self) -> str:
        """See `EngineFlags.longest`."""
        return (
            f"prompts of {self.max_input_length} tokens (server.max_input_length), and {self.max_total_tokens} with "
            "the answer (server.max_total_tokens)"
        )

    def refuses(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether the server answers 422 to such a request (router/src/validation.rs:63-123)."""
        return prompt_tokens + max_new_tokens > self.max_total_tokens or prompt_tokens > self.max_input_length

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """See `EngineFlags.check_fits`."""
        if self.refuses(prompt_tokens, max_new_tokens):
            return
        prompt, new = prompt_tokens, max_new_tokens
        if not self.requires_padding:
            prompt, new = ceil_block(prompt), ceil_block(new)
        what = f"a request of {prompt_tokens} + {max_new_tokens} tokens"
        if prompt > self.max_batch_prefill_tokens:
            raise CannotFit(
                f"{what} counts {prompt} prompt tokens, more than server.max_batch_prefill_tokens "
                f"{self.max_batch_prefill_tokens}: TGI 0.9.4 would wait for ever"
            )
        budget = self.max_batch_total_tokens
        if isinstance(budget, Bounds):
            budget = budget.high
        elif self.requires_padding:
            budget = self.token_budget
        if budget is not None and prompt + new > budget:
            raise CannotFit(
                f"{what} counts {prompt + new} tokens, more than server.max_batch_total_tokens "
                f"{budget}: TGI 0.9.4 would wait for ever"
            )

    def check(self, fail: Fail) -> None:
        """See `EngineFlags.check`: the launcher's own cross checks, too (launcher/src/main.rs:1016-1059)."""
        longest, total = self.max_input_length, self.max_total_tokens
        if longest >= total:
            raise fail(("max_input_length",), f"expected less than max_total_tokens ({total}), found {longest}")
        if longest > self.max_batch_prefill_tokens:
            raise fail(
                ("max_batch_prefill_tokens",),
                f"expected at least max_input_length ({longest}), found {self.max_batch_prefill_tokens}",
            )
        budget = self.max_batch_total_tokens
        low = budget.low if isinstance(budget, Bounds) else budget
        for name in ("max_batch_prefill_tokens", "max_total_tokens"):
            if low is not None and low < getattr(self, name):
                raise fail(
                    ("max_batch_total_tokens",), f"expected at least {name} ({getattr(self, name)}), found {low}"
                )

    def settled(self, capacity: float | None, uniform: Uniform, machine: Hardware) -> Flags:
        """The token budget is the scenario's if it names one, else the calibration's. Of bounds, what the calibration
        inferred within them; else it is drawn."""
        budget = self.max_batch_total_tokens
        if isinstance(budget, Bounds) and capacity is not None and budget.low <= capacity <= budget.high:
            budget = round(capacity)
        elif isinstance(budget, Bounds):
            budget = uniform(budget.low, budget.high)
        elif budget is None and capacity is not None:
            budget = round(capacity)
        elif budget is None and not self.requires_padding:
            raise BadInput(
                "expected a number of tokens here or in the calibration, which has none",
                key="server.max_batch_total_tokens",
            )
        return msgspec.structs.replace(self, max_batch_total_tokens=budget)

    def widened(self, prompt_tokens: int, total_tokens: int, users: int, given: set[str]) -> Flags:
        """See `EngineFlags.widened`."""
        least = {
            "max_input_length": prompt_tokens,
            "max_total_tokens": total_tokens,
            "max_batch_prefill_tokens": ceil_block(prompt_tokens),
            "max_concurrent_requests": users,
        }
        wider = {name: max(getattr(self, name), value) for name, value in least.items() if name not in given}
        return msgspec.structs.replace(self, **wider)

    def full(self, steps: Mapping[str, NDArray[Any]], prompt_tokens: int, max_new_tokens: int) -> dict[str, float]:
        """The share of the requests admitted that came in an admission after which another of the usual size would not
        have fitted into the token budget, and likewise into the prefill budget."""
        prompt, new = ceil_block(prompt_tokens), ceil_block(max_new_tokens)
        admitted = np.where(steps["inside"], steps["prefill_sequences"], 0)
        total = max(1, admitted.sum())
        budget = steps["held"] + (admitted + 1) * (prompt + new) > self.token_budget
        prefill = (admitted + 1) * prompt > self.max_batch_prefill_tokens
        return {
            "budget_full": float(admitted[budget].sum() / total),
            "prefill_full": float(admitted[prefill].sum() / total),
        }
