"""A toy `WeightKind`, and models whose every weight is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.kernels.linear import linear, lookup
from lfm_jax.weight_kinds import WeightKind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(WeightKind):
    """The array w * s, s one number."""

    w: jax.Array
    s: jax.Array

    @property
    def shape(self):
        return self.w.shape

    @property
    def dtype(self):
        return self.w.dtype

    def astype(self, dtype):
        return (self.w * self.s).astype(dtype)

    def linear(self, x, **how):
        return linear(x, self.w, **how) * self.s

    def lookup(self, ids_BT, dtype):
        return lookup(ids_BT, self.w, dtype) * self.s


def scaled(params, seed=0):
    """The same arrays, each as a `Scaled`; by powers of two, so that nothing is rounded."""
    rng = np.random.default_rng(seed)

    def leaf(w):
        s = jnp.asarray(rng.choice([0.25, 0.5, 2.0, 4.0]), w.dtype)
        return Scaled(w / s, s)

    return jax.tree.map(leaf, params)


def dense(params):
    """The arrays that the kinds of a tree stand for."""
    return jax.tree.map(lambda w: w.astype(w.dtype), params, is_leaf=lambda w: isinstance(w, WeightKind))
