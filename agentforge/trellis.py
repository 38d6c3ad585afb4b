"""Trellises: which whole numbers may follow each other, so that fewer of them lie closer to what they stand for.

A trellis (Ungerboeck 1982, table I, of systematic convolutional codes with feedback) takes a bit a value: of a state s the
values z, z + 2, z - 2, z + 4, ... are allowed, z = s & 1, and the next state depends on s and on the bit u = (k >> 1) & 1 of
the value k that is taken.  So neighbours are twice as far apart as values are, while all of them are in use, and whoever
knows the values before knows which half the next one is of: it is stored as m = (k - z) / 2, zigzag.

A matrix has a path down each of its columns, which begins in state 0 and does so again every `RESTART` rows.

Codings, of zigzag integers k that are such paths: trellis8, trellis32 and trellis256, by the number of states.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import njit

from .bits import unzigzag, zigzag
from .errors import BadInput

# Parity polynomials h0 and h1 by the number of states, in octal as there.
POLYNOMIALS = {8: (0o13, 0o4), 32: (0o45, 0o10), 256: (0o515, 0o362)}
RESTART = 1024  # rows of a path: sums of costs stay exact enough, and what a restart costs, a bit or two, is little a value

Array = np.ndarray[Any, Any]


@functools.cache
def successors(states: int) -> Array:
    """The state after state s and bit u: uint8[states, 2].

    The polynomials ask for sum_i h0_i z_{t-i} + h1_i u_{t-i} = 0 (mod 2); bit j of a state is what the past
    adds to that sum in j steps.
    """
    h0, h1 = POLYNOMIALS[states]
    s, u = np.arange(states)[:, None], np.arange(2)
    return np.asarray((s >> 1) ^ (s & 1) * (h0 >> 1) ^ u * (h1 >> 1), np.uint8)


def split(values: torch.Tensor, coding: str) -> tuple[torch.Tensor, Array]:
    """m, zigzag, and z of the values: int32[rows, columns] below 2**16, and uint8[rows, columns].

    Raises BadInput if the values are no paths, or too large.
    """
    codes = unzigzag(values)
    stored, odd = zigzag(codes >> 1), (codes & 1).numpy().astype(np.uint8)
    if stored.numel() and int(stored.max()) >> 16:
        raise BadInput(f"a value of {int(codes.abs().max())} does not fit into 16 bits and its parity")
    if not np.array_equal(_parities(stored.numpy(), successors(states_of(coding))), odd):
        raise BadInput(f"the values are no path of {coding}")
    return stored, odd


def join(stored: torch.Tensor, coding: str) -> torch.Tensor:
    """The inverse of `split`, from m, zigzag, alone: int32[rows, columns]."""
    odd = torch.from_numpy(_parities(stored.to(torch.int32).numpy(), successors(states_of(coding))))
    return zigzag(2 * unzigzag(stored) + odd)


def states_of(coding: str) -> int:
    """How many states the trellis of a coding has."""
    return int(coding.removeprefix("trellis"))


@njit(nogil=True, cache=True)
def _parities(stored: Array, following: Array) -> Array:
    """z of each value: uint8[rows, columns]."""
    rows, columns = stored.shape
    odd = np.empty((rows, columns), np.uint8)
    state = np.zeros(columns, np.uint8)
    for r in range(rows):
        if r % RESTART == 0:
            state[:] = 0
        for c in range(columns):
            odd[r, c] = state[c] & 1
            state[c] = following[state[c], (stored[r, c] + 1) >> 1 & 1]
    return odd


@njit(nogil=True, cache=True)
def place(queues: Array, at: Array, cells: Any, transposed: bool, following: Array, out: Array) -> bool:
    """Put values, the last digits of m in zigzag, where they belong.  False if a queue ends too early.

    queues: for each cell its values of even k in their order, then those of odd k.  at: where these queues begin, and the
    end; it is overwritten.  cells: int64[lines] and int64[n], of which the sum is a value's cell, and the last cell, in
    which lie those beyond.  transposed: whether a line is a column.  out: int32[lines, n].
    """
    of_lines, across, most = cells
    ends = at[1:].copy()
    lines, n = out.shape
    state = np.zeros(lines if transposed else n, np.uint8)
    for i in range(lines):
        for j in range(n):
            path, time = (i, j) if transposed else (j, i)
            s = state[path] if time % RESTART else np.uint8(0)
            queue = 2 * min(max(of_lines[i] + across[j], 0), most) + (s & 1)
            if at[queue] == ends[queue]:
                return False
            out[i, j] = queues[at[queue]]
            at[queue] += 1
            state[path] = following[s, (out[i, j] + 1) >> 1 & 1]
    return True
