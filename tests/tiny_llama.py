"""A real engine without a GPU: a tiny Llama of random weights as GGUF, served by the real llama.cpp HTTP server.

Every output token prints as one word, so that one event is one token; under greedy decoding it never ends by itself.

    python tests/tiny_llama.py FOLDER      writes FOLDER/tiny.gguf, serves it on a free port, prints the URL
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from numpy.typing import NDArray

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 192, 512, 4, 6, 2, 4096, 4096
HEAD = HIDDEN // HEADS
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tensors(seed: int = 0) -> Iterator[tuple[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)

    def random(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)

    yield "token_embd", random(VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        yield f"blk.{i}.attn_norm", np.ones(HIDDEN, np.float32)
        yield f"blk.{i}.attn_q", random(HEADS * HEAD, HIDDEN)
        yield f"blk.{i}.attn_k", random(KV_HEADS * HEAD, HIDDEN)
        yield f"blk.{i}.attn_v", random(KV_HEADS * HEAD, HIDDEN)
        yield f"blk.{i}.attn_output", random(HIDDEN, HEADS * HEAD)
        yield f"blk.{i}.ffn_norm", np.ones(HIDDEN, np.float32)
        yield f"blk.{i}.ffn_gate", random(INTER, HIDDEN)
        yield f"blk.{i}.ffn_up", random(INTER, HIDDEN)
        yield f"blk.{i}.ffn_down", random(HIDDEN, INTER)
    yield "output_norm", np.ones(HIDDEN, np.float32)
    # control and byte tokens have logit 0: they never win against the largest of thousands of random logits
    output = random(VOCABULARY, HIDDEN)
    output[: len(SPECIAL) + 256] = 0
    yield "output", output


def write(path: Path) -> Path:
    """Write the model."""
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_block_count(LAYERS)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INTER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HEAD)
    w.add_vocab_size(VOCABULARY)
    tokens = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [f"\u2581w{i}" for i in range(VOCABULARY - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * VOCABULARY)
    w.add_token_types(kinds + [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds)))
    w.add_unk_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(TEMPLATE)
    for name, values in tensors():
        w.add_tensor(f"{name}.weight", values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def serve(model: Path) -> None:
    """Serve the model until stdin ends: one thread, four slots, no prompt cache."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.port = 4 * CONTEXT, 4, 0
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_prompt, params.warmup = False, False
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    serve(write(Path(sys.argv[1]) / "tiny.gguf"))
