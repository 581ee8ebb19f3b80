"""text-generation-inference 0.9.4: the router's queue, its admission rules, and the batch its shard keeps.

The rules are those of router/src/queue.rs and infer.rs, and for the tokens that a shard reports those of
server/text_generation_server/models (flash_causal_lm.py, causal_lm.py), at the tag v0.9.4. Before every decode step the
router examines its queue, and prefills what fits from its front if that is enough to be worth a prefill, or if it has
waited long enough. A prefill is a step of its own; those it admits are then joined to the running batch.

`flags` (what is configured), `entry` (a request and its blocks), `engine` (queue and admission), `batch` (who runs).
"""

from sim.engines.tgi_0_9_4.batch import Batch
from sim.engines.tgi_0_9_4.engine import Engine
from sim.engines.tgi_0_9_4.entry import BLOCK, Entry, ceil_block
from sim.engines.tgi_0_9_4.flags import Flags

__all__ = ["BLOCK", "Batch", "Engine", "Entry", "Flags", "ceil_block"]
