"""Tensors that quantisation is tried on, seeded, and their error as it counts."""

import numpy as np

ROWS, COLUMNS = 24, 512
KINDS = ("normal", "heavy", "columns", "shifted")


def tensor(kind, rows=ROWS, columns=COLUMNS):
    """`normal`, `heavy` tails (Student's t, 3 degrees), `columns` of different sizes, `shifted` away from zero."""
    rng = np.random.default_rng([KINDS.index(kind), rows, columns])
    normal = 0.02 * rng.standard_normal((rows, columns), np.float32)
    return {
        "normal": lambda: normal,
        "heavy": lambda: (0.02 * rng.standard_t(3, (rows, columns))).astype(np.float32),
        "columns": lambda: normal * np.exp(rng.standard_normal(columns, np.float32)),
        "shifted": lambda: normal + np.float32(0.05),
    }[kind]()


def weights(columns=COLUMNS):
    """Importance of columns, over four orders of magnitude."""
    return np.exp(2 * np.random.default_rng(columns).standard_normal(columns)).astype(np.float32)


def relative_error(found, x, importance=None):
    """The root of the mean square error over that of the numbers, both weighted."""
    weight = 1.0 if importance is None else importance.astype(np.float64)
    x = x.astype(np.float64)
    return float(np.sqrt((weight * (found - x) ** 2).mean() / (weight * x**2).mean()))
