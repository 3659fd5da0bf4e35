"""Tensors that follow from a formula, the same in every library. Dimensions: B rows, T time."""

import numpy as np

B, T = 4, 7
LENGTHS = {"chosen": (7, 3, 5, 1), "rejected": (2, 6, 5, 4)}


def logprobs(phase, scale=1.0):
    """[B, T], float64 and below 0: `-scale (1 + sin(phase + 1.7 b + 0.9 t))`."""
    b, t = np.arange(B)[:, None], np.arange(T)[None]
    return -scale * (1 + np.sin(phase + 1.7 * b + 0.9 * t))


def mask(lengths):
    """[B, T]: as many tokens of each row as `lengths` says."""
    return (np.arange(T)[None] < np.asarray(lengths)[:, None]).astype(np.float64)


def pair(side):
    """(policy, reference, mask) of one side of B pairs."""
    phase = {"chosen": 0.3, "rejected": 1.1}[side]
    return logprobs(phase, 2.0), logprobs(phase + 0.2, 1.8), mask(LENGTHS[side])


def rollouts():
    """(policy, behaviour, reference, mask, advantages): ratios on both sides of the usual clips."""
    policy = logprobs(0.3, 1.5)
    behaviour = policy + 0.4 * np.cos(np.arange(B * T)).reshape(B, T)
    return policy, behaviour, logprobs(0.5, 1.4), mask((7, 3, 5, 1)), np.array([1.3, -0.7, 0.4, -1.0])


def gradient(f, x, h=1e-5):
    """Central differences of a float64 function, by each entry of x."""
    d = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        d[i] = (f(up) - f(down)) / (2 * h)
    return d
