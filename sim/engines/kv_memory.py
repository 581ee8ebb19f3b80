"""How many tokens of KV cache fit beside a model's weights, for models of known shape and GPUs of known memory.

What the weights leave is known well, what a profiling run, CUDA's context and communication buffers take is not: the
result is a range.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sim.model.server import Bounds

GIB = 2**30
BYTES = 2  # of a weight, and of a key or value: bfloat16 and float16
# GiB that belong to neither weights, activations nor KV cache: CUDA's context alone takes 0.4 to 0.6; with NCCL, the
# allocator's reserve and CUDA graphs up to about 4
OTHER = (0.5, 4.0)
SLACK = 0.02  # of a board's nominal memory that the driver keeps (an A100 of 40 GB has 39.4 GiB)


class Shape(NamedTuple):
    """A model's shape, from its config.json; `parameters` as its card counts them."""

    parameters: float
    layers: int
    kv_heads: int
    head_size: int
    hidden: int
    intermediate: int
    vocabulary: int
    longest: int  # max_position_embeddings, tokens


MODELS = {
    "llama-2-7b": Shape(6.74e9, 32, 32, 128, 4096, 11008, 32000, 4096),
    "llama-2-13b": Shape(13.0e9, 40, 40, 128, 5120, 13824, 32000, 4096),
    "llama-2-70b": Shape(69.0e9, 80, 8, 128, 8192, 28672, 32000, 4096),
    "llama-3-8b": Shape(8.03e9, 32, 8, 128, 4096, 14336, 128256, 8192),
    "llama-3-70b": Shape(70.6e9, 80, 8, 128, 8192, 28672, 128256, 8192),
    "llama-3.1-8b": Shape(8.03e9, 32, 8, 128, 4096, 14336, 128256, 131072),
    "llama-3.1-70b": Shape(70.6e9, 80, 8, 128, 8192, 28672, 128256, 131072),
    "mistral-7b": Shape(7.24e9, 32, 8, 128, 4096, 14336, 32000, 32768),
    "qwen2.5-7b": Shape(7.62e9, 28, 4, 128, 3584, 18944, 152064, 32768),
}
# GB, from the vendors' data sheets; boards that come in several sizes are named with theirs (A100-80GB)
BOARDS = {
    "v100": 16,
    "t4": 16,
    "a10": 24,
    "a10g": 24,
    "l4": 24,
    "rtx4090": 24,
    "l40": 48,
    "l40s": 48,
    "a6000": 48,
    "a100": 40,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "mi300x": 192,
}


def shape_of(model: str | None) -> Shape | None:
    """The shape of a model by its name, as hubs write it too (`meta-llama/Llama-2-70b-chat-hf`); None if unknown."""
    name = _plain((model or "").rpartition("/")[2]).removeprefix("meta")
    return next(
        (MODELS[known] for known in sorted(MODELS, key=len, reverse=True) if name.startswith(_plain(known))), None
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def board_gigabytes(gpu: str | None) -> float | None:
    """The memory of a GPU by its name, GB; None if unknown."""
    name = re.sub(r"^(nvidia|amd|tesla|rtx)[ -]+", "", (gpu or "").lower())
    said = re.search(r"(\d+) ?gi?b", name)
    return float(said[1]) if said else BOARDS.get(re.split(r"[ -]", name)[0])


def is_cpu(gpu: str | None) -> bool:
    """Whether that is no GPU."""
    return (gpu or "").lower().startswith("cpu")


def kv_cache(
    model: str | None, gpu: str | None, shards: int, utilization: float, batched_tokens: int, sequences: int
) -> Bounds | None:
    """Tokens of KV cache of a server that fills `utilization` of its boards; None where model or GPU are unknown or the
    weights do not fit.

    (utilization · memory - weights - activations - other) / (layers · 2 · KV heads · head size · bytes), on one of
    `shards` boards. Activations are those of a pass of `batched_tokens`: two copies of the wider layer's rows, and
    float32 logits of `sequences`.
    """
    shape, gigabytes = shape_of(model), board_gigabytes(gpu)
    if shape is None or gigabytes is None:
        return None
    memory = utilization * gigabytes * GIB * (1 - SLACK)
    weights = shape.parameters * BYTES / shards
    rows = batched_tokens * (2 * shape.intermediate / shards + 4 * shape.hidden) * BYTES
    activations = rows + 4 * sequences * shape.vocabulary
    token = shape.layers * 2 * max(shape.kv_heads / shards, 1.0) * shape.head_size * BYTES
    most, least = ((memory - weights - activations - other * GIB) / token for other in OTHER)
    return Bounds(low=max(int(least), 1), high=int(most)) if most >= 1 else None
