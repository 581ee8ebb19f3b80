"""Normal equations of step durations per block of seconds, with the random effects eliminated.

All steps of a block share a random effect, and so do all of a rung. Each multiplies the durations it applies to. Both
are absorbed into the normal equations, those of blocks before blocks are summed to a rung, those of rungs before rungs
are summed (mixed-model equations: Henderson 1953). The result is generalised least squares: differences between steps
within seconds count in full, differences between rungs as far as random effects leave them open. Blocks can be left out
or reweighted within a millisecond. Run effects are not absorbed: few runs say little about them, and with one run its
effect could not be told from the speed of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from calibrate.arrays import Floats, Ints
from calibrate.regression.design import BLOCK_SECONDS, Rows
from calibrate.regression.random_effects import RandomEffects


@dataclass(frozen=True)
class Equations:
    """Normal equations of every block for p coefficients and, last, one random effect.

    `grams` are (blocks, p + 1, p + 1) and `rights`, the right-hand sides of prefills and of decode steps, (blocks, 2, p
    + 1); the effects of the blocks themselves are eliminated, the last row and column belong to their rung's. `rung`,
    (blocks,), is ascending; `rung_variance`, (rungs,), is the relative variance of each rung's effect.
    """

    grams: Floats
    rights: Floats
    rung: Ints
    rung_variance: Floats

    def reduced(self, weight: Floats, slower: Floats | None = None) -> tuple[Floats, Floats]:
        """The normal equations, (p, p) and (p,), with all random effects eliminated.

        `weight`, (blocks,), is how often each block counts; `slower`, (blocks, 2), multiplies the durations of its
        prefills and decode steps.
        """
        each = weight[:, None] if slower is None else weight[:, None] * slower
        rights = np.einsum("bk,bkp->bp", np.broadcast_to(each, (len(weight), 2)), self.rights)
        grams, rights = _sums(self.rung, self.grams * weight[:, None, None]), _sums(self.rung, rights)
        if len(grams) > 1:  # the effect of an only rung cannot be told from the machine's speed
            grams, rights = _absorb(grams, rights, self.rung_variance)
        return grams.sum(axis=0)[:-1, :-1], rights.sum(axis=0)[:-1]


def equations(rows: Rows, columns: Floats, weight: Floats, exposure: Floats, effects: RandomEffects) -> Equations:
    """The equations of `columns`, (rows, p), of rows with a `weight`, 1/s.

    `exposure`, (rows,), is by how many seconds a random effect of 1 lengthens each row.
    """
    rung = rows.rung_of_block
    blocks, terms = len(rung), columns.shape[1] + 1
    order = np.argsort(rows.block, kind="stable")
    cuts = np.searchsorted(rows.block[order], np.arange(blocks + 1))
    design = np.empty((len(order), terms))
    np.multiply(columns[order], weight[order, None], out=design[:, :-1])
    np.multiply(exposure[order], weight[order], out=design[:, -1])
    seconds, prefill = (rows.seconds * weight)[order], rows.prefill[order]
    of_kind = np.column_stack([np.where(prefill, seconds, 0.0), np.where(prefill, 0.0, seconds)])
    grams, rights = np.empty((blocks, terms, terms)), np.empty((blocks, 2, terms))
    for b, (start, stop) in enumerate(pairwise(cuts)):
        x = design[start:stop]  # a view: copies took most of the time
        grams[b] = x.T @ x
        rights[b] = of_kind[start:stop].T @ x
    grams, rights = _absorb(grams, rights, np.full(blocks, effects.block_sd(BLOCK_SECONDS) ** 2))
    blocks_of_rung = np.bincount(rung).tolist()
    rung_variance = np.square([effects.rung_sd(n * BLOCK_SECONDS, n) for n in blocks_of_rung])
    return Equations(grams, rights, rung, rung_variance)


def _absorb(grams: Floats, rights: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """The equations with the last unknown of each eliminated, a random effect of this variance. The column stays: the
    effect of the enclosing rung applies to the same rows."""
    column = grams[..., -1]
    share = (variance / (1 + variance * column[:, -1]))[:, None]
    effect = (rights[..., -1].reshape(len(rights), -1) * share).reshape(rights.shape[:-1])
    return (
        grams - (share * column)[:, :, None] * column[:, None, :],
        rights - effect[..., None] * (column if rights.ndim == 2 else column[:, None, :]),
    )


def _sums(group: Ints, values: Floats) -> Floats:
    """Sums of the values of each group; groups are ascending, and none is empty."""
    return np.add.reduceat(values, np.unique(group, return_index=True)[1], axis=0)
