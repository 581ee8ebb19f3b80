"""vLLM V1, as of version 0.32.0: its engine core and scheduler.

There is no prefill phase and no decode phase: every step gives running requests their next tokens first, in the order
of admission, and then admits waiting ones, as far as the token budget and the KV cache go. A request that gets no block
preempts the one admitted last, which loses its cache and starts again from the head of the queue.

`flags` (what is configured), `versions` (rules that differ), `held` (a request), `step` (as it was scheduled),
`prefix_cache` (which blocks hold which texts), `scheduler` (the next step), `engine` (steps ahead, and many as one).
"""

from sim.engines.vllm_v1.engine import Engine
from sim.engines.vllm_v1.flags import Flags

__all__ = ["Engine", "Flags"]
