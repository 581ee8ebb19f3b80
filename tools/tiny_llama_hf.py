"""A small Llama of random weights as a Hugging Face folder: `python tools/tiny_llama_hf.py FOLDER`.

Every output token prints as one word, so that one event is one token, and greedy decoding never ends by itself: the
control tokens' logits are 0, which never win against the largest of thousands of random ones.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 512, 1408, 8, 8, 4, 8192, 4096  # 32 million weights
HEAD = HIDDEN // HEADS
SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

Floats = NDArray[np.float32]


def tensors(seed: int = 0) -> Iterator[tuple[str, Floats]]:
    """The weights by their names."""
    rng = np.random.default_rng(seed)

    def random(rows: int, columns: int) -> Floats:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)

    yield "model.embed_tokens.weight", random(VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", np.ones(HIDDEN, np.float32)
        for name, rows in (("q", HEADS * HEAD), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
            yield f"{layer}.self_attn.{name}_proj.weight", random(rows, HIDDEN)
        yield f"{layer}.self_attn.o_proj.weight", random(HIDDEN, HEADS * HEAD)
        yield f"{layer}.post_attention_layernorm.weight", np.ones(HIDDEN, np.float32)
        yield f"{layer}.mlp.gate_proj.weight", random(INTER, HIDDEN)
        yield f"{layer}.mlp.up_proj.weight", random(INTER, HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", random(HIDDEN, INTER)
    yield "model.norm.weight", np.ones(HIDDEN, np.float32)
    head = random(VOCABULARY, HIDDEN)
    head[: len(SPECIAL)] = 0
    yield "lm_head.weight", head


def write(folder: Path) -> Path:
    """Write the model, unless it is there."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    words = SPECIAL + [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]
    added = [
        {"id": i, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "chat_template": template}
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": NAMES | described,
        "special_tokens_map.json": NAMES,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name, values in tensors():
        parts.append(values.tobytes())
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (folder / "model.safetensors").write_bytes(b"".join([struct.pack("<Q", len(head)), head, *parts]))
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
