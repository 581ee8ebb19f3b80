"""Normal equations of step times, block by block, with the machine's moods taken out of them.

All steps of a block of seconds share a mood, and those of a rung another: random effects of known size, which multiply
the steps they are felt by. They are eliminated from the inside out, a block's before blocks are summed to a rung, a
rung's before rungs are summed (the mixed-model equations of Henderson 1953, absorbed): generalised least squares, in
which what steps differ by within a few seconds counts in full, and what whole rungs differ by only as far as moods
leave it open. Blocks can still be left out or reweighted, which costs a millisecond. What whole runs keep is left in:
few runs say little of it, and as an effect of its own it would take the machine's speed from the one run there may be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from calibrate.regression.design import BLOCK_SECONDS, Rows
from calibrate.regression.random_effects import RandomEffects

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Equations:
    """Of every block the Gram matrix, (blocks, p + 1, p + 1), and the right-hand sides of prefills and of decode steps,
    (blocks, 2, p + 1); the last column is the mood's, that of the block itself eliminated. `rung` of each block is in
    ascending order; `of_rung`, (rungs,), are the variances of their moods, relative.
    """

    grams: Floats
    rights: Floats
    rung: Ints
    of_rung: Floats

    def reduced(self, weight: Floats, slower: Floats | None = None) -> tuple[Floats, Floats]:
        """The p normal equations, (p, p) and (p,), of blocks that count so often, (blocks,), and whose prefills and
        decode steps are that much `slower`, (blocks, 2)."""
        each = weight[:, None] if slower is None else weight[:, None] * slower
        rights = np.einsum("bk,bkp->bp", np.broadcast_to(each, (len(weight), 2)), self.rights)
        grams, rights = _by(self.rung, self.grams * weight[:, None, None]), _by(self.rung, rights)
        if len(grams) > 1:  # the mood of an only rung cannot be told from the machine
            grams, rights = _absorbed(grams, rights, self.of_rung)
        return grams.sum(axis=0)[:-1, :-1], rights.sum(axis=0)[:-1]


def equations(
    rows: Rows, columns: Floats, weight: Floats, felt: Floats, moods: RandomEffects, usual: Floats
) -> Equations:
    """The equations of `columns`, (rows, p), each row with a `weight`, 1/s. `felt` is by how much a mood of 1 lengthens
    each row, s; whole rungs count by how `usual` they are, (rungs,)."""
    rung = rows.rung_of_block
    blocks, terms = len(rung), columns.shape[1] + 1
    order = np.argsort(rows.block, kind="stable")
    cuts = np.searchsorted(rows.block[order], np.arange(blocks + 1))
    design = np.empty((len(order), terms))
    np.multiply(columns[order], weight[order, None], out=design[:, :-1])
    np.multiply(felt[order], weight[order], out=design[:, -1])
    seconds, prefill = (rows.seconds * weight)[order], rows.prefill[order]
    of_kind = np.column_stack([np.where(prefill, seconds, 0.0), np.where(prefill, 0.0, seconds)])
    grams, rights = np.empty((blocks, terms, terms)), np.empty((blocks, 2, terms))
    for b, (start, stop) in enumerate(pairwise(cuts)):
        x = design[start:stop]  # a view: copies took most of the time
        grams[b] = x.T @ x
        rights[b] = of_kind[start:stop].T @ x
    grams, rights = _absorbed(grams, rights, np.full(blocks, moods.block_sd(BLOCK_SECONDS) ** 2))
    blocks_of_rung = np.bincount(rung).tolist()
    of_rung = np.square([moods.rung_sd(n * BLOCK_SECONDS, n) for n in blocks_of_rung]) / usual
    scale = usual[rung][:, None, None]
    return Equations(grams * scale, rights * scale, rung, of_rung)


def _absorbed(grams: Floats, rights: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """The equations once the last unknown of each, a random effect of such a variance, is eliminated. The column stays:
    the mood of what the block or the rung lies in is felt by the same steps."""
    column = grams[..., -1]
    share = (variance / (1 + variance * column[:, -1]))[:, None]
    effect = (rights[..., -1].reshape(len(rights), -1) * share).reshape(rights.shape[:-1])
    return (
        grams - (share * column)[:, :, None] * column[:, None, :],
        rights - effect[..., None] * (column if rights.ndim == 2 else column[:, None, :]),
    )


def _by(group: Ints, values: Floats) -> Floats:
    """The sums of values whose group is the same; groups are ascending, and none is missing."""
    return np.add.reduceat(values, np.unique(group, return_index=True)[1], axis=0)
