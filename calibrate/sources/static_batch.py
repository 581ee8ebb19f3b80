"""What each coefficient of an affine step time multiplies in a batch that starts and ends together: one prefill, then
decode steps in which every context grows by a token."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from calibrate.arrays import Floats
from sim.steptime.basis import AFFINE, COLUMNS, DECODE, DROP, JOIN, PREFILL, columns

# a batch that no request joins or leaves
TERMS = {name: term for name, term in AFFINE.items() if term.of not in (JOIN, DROP)}
PREFILL_TERMS, DECODE_TERMS = (tuple(n for n, term in TERMS.items() if term.of == of) for of in (PREFILL, DECODE))


def prefill_terms(sequences: ArrayLike, prompt: ArrayLike) -> dict[str, Floats]:
    """The terms of prefilling `sequences` prompts of `prompt` tokens each; both broadcast."""
    n, tokens = np.broadcast_arrays(np.asarray(sequences, dtype=np.float64), np.asarray(prompt, dtype=np.float64))
    work = (np.ones_like(n), n * tokens, n, n * tokens * (tokens + 1) / 2, tokens)
    return columns(TERMS, dict(zip(COLUMNS, work, strict=False)))


def decode_terms(sequences: ArrayLike, context: ArrayLike) -> dict[str, Floats]:
    """The terms of one decode step of `sequences` contexts of `context` tokens each; both broadcast."""
    n, tokens = np.broadcast_arrays(np.asarray(sequences, dtype=np.float64), np.asarray(context, dtype=np.float64))
    work = {"decode_sequences": n, "decode_context": n * tokens, "decode_longest": tokens}
    return columns(TERMS, work)


def batch_terms(sequences: ArrayLike, prompt: ArrayLike, output: ArrayLike) -> dict[str, Floats]:
    """The terms of a whole batch from prefill to its last token, `output` tokens a sequence; all broadcast.

    The first token is the prefill's. Step j of the others has contexts of prompt + j tokens, and every term is linear
    in j, so that the sum over steps is their number times the mean of the first and the last.
    """
    tokens, steps = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64) - 1
    prefill = prefill_terms(sequences, tokens)
    first, last = decode_terms(sequences, tokens + 1), decode_terms(sequences, tokens + steps)
    return {name: prefill[name] + steps * (first[name] + last[name]) / 2 for name in TERMS}
