"""Discrete latent trees by elimination: normaliser, marginals, joint draws, mode, entropy, KL, a level at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ppl_lvm import ops
from ppl_lvm.errors import DataError
from ppl_lvm.ops import Array
from ppl_lvm.structured.markov_chain import _finite, _inverse
from ppl_lvm.structured.scan import behind_steps


class TreeStatistics(NamedTuple):
    """Expected statistics of `q(z)`, nodes in front."""

    single: Array
    """`q(z_n = v)`, `[N, ..., V]`."""
    pair: Array
    """`q(z_parent(n) = v, z_n = w)` of all nodes but the root, `[N - 1, ..., V, V]`."""


@dataclass(frozen=True)
class _Level:
    """Nodes at one distance from the root."""

    nodes: np.ndarray
    parents: np.ndarray
    children: np.ndarray
    """Of each node the places of its children among the nodes of the next level, filled up with their number."""


@dataclass(frozen=True)
class Tree:
    """`q(z) = 1/Z exp( root(z_0) + sum_{n>0} edge_n(z_parent(n), z_n) + sum_n node_n(z_n) )`, z_n of V values.

    `parents` says which node is above which: -1 of node 0, the root, and an earlier node of every other one. Nodes are
    the first axis of `edge` `[N - 1, ..., V, V]` (from the parent, to the node), without the root's, and of `node`
    `[N, ..., V]`; `root` is `[..., V]`; the axes between are batches, which broadcast. All are logs and need not be
    normalised; -inf forbids a value. `node` holds log likelihoods of data, what a recognition network says, or what is
    known of a node (0 for its value, -inf for the others); None: nothing. With normalised `root` and `edge` and no
    `node` Z = 1.

    Messages go up and down a level at a time, all nodes of a level together, so that the cost is of the depth's many
    operations. A tree that is a chain is better a `MarkovChain`.

    Raises:
        DataError: shapes do not fit, or `parents` is no tree in that order.

    Source: Pearl (1988), Probabilistic Reasoning in Intelligent Systems, chapter 4; Felsenstein (1981), Evolutionary
    Trees from DNA Sequences, Journal of Molecular Evolution 17.

    Example:
        >>> import torch
        >>> copy = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
        >>> leaf = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -torch.inf], [-torch.inf, 0.0]])
        >>> q = Tree((-1, 0, 1, 1), torch.tensor([0.5, 0.5]).log(), torch.stack([copy] * 3), leaf)
        >>> [round(float(p), 3) for p in q.statistics().single[:, 0]]
        [0.399, 0.407, 1.0, 0.0]
        >>> round(float(q.log_normalizer()), 4), q.mode().tolist()
        (-2.1078, [1, 1, 0, 1])
    """

    parents: tuple[int, ...]
    root: Array
    edge: Array
    node: Array | None = None

    def __post_init__(self) -> None:
        N, V = len(self.parents), self.root.shape[-1]
        wrong = [n for n, p in enumerate(self.parents) if (p != -1 if n == 0 else not 0 <= p < n)]
        if not N or wrong:
            said = f"node {wrong[0]} has parent {self.parents[wrong[0]]}" if wrong else "there is none"
            raise DataError(f"Node 0 of a Tree is the root, of parent -1, and others have an earlier node; {said}.")
        needed = {"edge": (N - 1, (V, V))} | ({} if self.node is None else {"node": (N, (V,))})
        for name, (first, event) in needed.items():
            shape = tuple(getattr(self, name).shape)
            if len(shape) < len(event) + 1 or shape[0] != first or shape[-len(event) :] != event:
                raise DataError(
                    f"{name} has shape {shape}; root says V = {V} and parents {N} nodes, so it is "
                    f"{(first, '...', *event)}."
                )

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.parents)

    @property
    def values(self) -> int:
        """V."""
        return int(self.root.shape[-1])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(N,)`."""
        return (self.nodes,)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """What all arguments broadcast to between nodes and values."""
        shapes = [self.root.shape[:-1], self.edge.shape[1:-2]]
        if self.node is not None:
            shapes.append(self.node.shape[1:-1])
        return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))

    @property
    def prior(self) -> Tree:
        """The tree without the node potentials."""
        return replace(self, node=None)

    def log_normalizer(self) -> Array:
        """`log Z`, `[...]`, in nats."""
        return ops.logsumexp(self._of_root, -1)

    def statistics(self) -> TreeStatistics:
        """Marginals of every node, and of every node with its parent."""
        xp, below = ops.xp(self.root), self._conditionals
        single, pair = [ops.softmax(self._of_root, -1)[None]], []
        for level, weights in zip(self._levels[1:], below, strict=True):
            both = single[-1][self._place[level.parents]][..., None] * weights
            pair.append(both)
            single.append(xp.sum(both, axis=-2))
        nothing = ops.zeros((0, *self.batch_shape, self.values, self.values), self.root)
        order = np.argsort(np.concatenate([level.nodes for level in self._levels]))
        pairs = xp.concat([nothing, *pair], axis=0)[order[1:] - 1]
        return TreeStatistics(xp.concat(single, axis=0)[order], pairs)

    def log_prob(self, z: Array) -> Array:
        """`log q(z)` of integers z `[N, ...]`, `[...]`, in nats; batch axes in front of the tree's are draws."""
        xp, draws = ops.xp(self.root), z.ndim - 1
        root, edge, node = self._aligned(max(draws, len(self.batch_shape)))
        at = ops.one_hot(z, self.values)
        pair = at[np.asarray(self.parents[1:], dtype=int)][..., :, None] * at[1:, ..., None, :]
        total = xp.sum(at[0] * root, axis=-1) + xp.sum(at * node, axis=(0, -1))
        return total + xp.sum(pair * edge, axis=(0, -2, -1)) - self.log_normalizer()

    def sample(self, uniform: Array) -> Array:
        """A draw of all nodes from uniforms on (0, 1) `[N, ...]`, integers `[N, ...]`, by inverse cumulative sums."""
        draws = uniform.ndim - 1
        first = _inverse(ops.softmax(self._of_root, -1), uniform[0])
        after = [
            _inverse(behind_steps(weights, 2, draws), uniform[level.nodes][..., None])
            for level, weights in zip(self._levels[1:], self._conditionals, strict=True)
        ]
        return self._followed(first, after)

    def mode(self) -> Array:
        """The most probable values of all nodes together, integers `[N, ...]`."""
        xp = ops.xp(self.root)
        best, origin = self._upwards(lambda a: xp.max(a, axis=-1))
        return self._followed(xp.argmax(best, axis=-1), [xp.argmax(a, axis=-1) for a in origin])

    def expected_log_prob(self, of: TreeStatistics) -> Array:
        """`E log q(z)` over any z with these statistics, `[...]`, in nats."""
        xp, batch = ops.xp(self.root), max(of.single.ndim - 2, len(self.batch_shape))
        of = TreeStatistics(behind_steps(of.single, 1, batch), behind_steps(of.pair, 2, batch))
        root, edge, node = self._aligned(batch)
        total = xp.sum(of.single[0] * root, axis=-1) + xp.sum(of.single * node, axis=(0, -1))
        return total + xp.sum(of.pair * edge, axis=(0, -2, -1)) - self.log_normalizer()

    def entropy(self) -> Array:
        """`-E log q(z)`, `[...]`, in nats."""
        return -self.expected_log_prob(self.statistics())

    def kl(self, other: Tree) -> Array:
        """`KL(q || other)` to a tree of the same shape, `[...]`, in nats. Of one with the same prior it is
        `E sum_n node_n(z_n) - log Z`.

        Raises:
            DataError: the other has other parents.
        """
        if self.parents != other.parents:
            raise DataError("KL of two Trees was asked for whose parents differ: their edges are of other pairs.")
        found = self.statistics()
        return self.expected_log_prob(found) - other.expected_log_prob(found)

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _levels(self) -> list[_Level]:
        parents = np.asarray(self.parents, dtype=int)
        depth = np.zeros(len(parents), dtype=int)
        for n, p in enumerate(self.parents[1:], 1):
            depth[n] = depth[p] + 1
        nodes = [np.flatnonzero(depth == k) for k in range(depth.max() + 1)]
        below: Sequence[np.ndarray] = [*nodes[1:], np.zeros(0, dtype=int)]
        found = []
        for mine, next_ in zip(nodes, below, strict=True):
            of = [np.flatnonzero(parents[next_] == n) for n in mine]
            children = np.full((len(mine), max(map(len, of))), len(next_))
            for row, places in zip(children, of, strict=True):
                row[: len(places)] = places
            found.append(_Level(mine, parents[mine], children))
        return found

    @cached_property
    def _place(self) -> np.ndarray:
        """Of every node, its place in its level."""
        place = np.zeros(self.nodes, dtype=int)
        for level in self._levels:
            place[level.nodes] = np.arange(len(level.nodes))
        return place

    def _aligned(self, batch: int) -> tuple[Array, Array, Array]:
        """Root, edges and nodes with as many batch axes, no -inf, and node potentials."""
        node = self.node
        if node is None:
            node = ops.zeros((self.nodes, *(1,) * batch, self.values), self.root)
        return _finite(self.root), _finite(behind_steps(self.edge, 2, batch)), _finite(behind_steps(node, 1, batch))

    @property
    def _summed(self) -> tuple[Array, list[Array]]:
        return ops.remember(self.root, self._kept, "summed", lambda: self._upwards(lambda a: ops.logsumexp(a, -1)))

    @property
    def _of_root(self) -> Array:
        """`log` of the sum over all other nodes, `[..., V]`."""
        return self._summed[0]

    @property
    def _conditionals(self) -> list[Array]:
        """`q(z_n = w | z_parent(n) = v)` of the nodes of every level but the root's, `[nodes, ..., V, V]`."""
        return [ops.softmax(a, -1) for a in self._summed[1]]

    def _upwards(self, reduce: Callable[[Array], Array]) -> tuple[Array, list[Array]]:
        """Log weights of the root `[..., V]`, and of every level below it edges and all after them `[n, ..., V, V]`."""
        xp, batch, V = ops.xp(self.root), self.batch_shape, self.values
        root, edge, node = self._aligned(len(batch))
        node = xp.broadcast_to(node, (self.nodes, *batch, V))
        arriving: list[Array] = []
        message = ops.zeros((0, *batch, V), self.root)
        for level in reversed(self._levels):
            padded = xp.concat([message, ops.zeros((1, *batch, V), self.root)], axis=0)
            own = node[level.nodes]
            if level.children.shape[1]:
                own = own + xp.sum(padded[level.children], axis=1)
            if level.nodes[0] == 0:
                return own[0] + root, arriving[::-1]
            both = edge[level.nodes - 1] + own[..., None, :]
            arriving.append(both)
            message = reduce(both)
        raise AssertionError("a tree has a root")

    def _followed(self, first: Array, after: list[Array]) -> Array:
        """Values of all nodes: of the root, then by maps from the parent's value to the node's `[nodes, ..., V]`."""
        xp = ops.xp(first)
        found = [first[None]]
        for level, maps in zip(self._levels[1:], after, strict=True):
            above = found[-1][self._place[level.parents]]
            found.append(xp.take_along_axis(maps, above[..., None], axis=-1)[..., 0])
        order = np.argsort(np.concatenate([level.nodes for level in self._levels]))
        return xp.concat(found, axis=0)[order]


def nodes_in_front(root: Array, edge: Array, node: Array | None = None) -> dict[str, Array]:
    """The arguments of a distribution, `[..., N, *event]`, as a `Tree` takes them."""
    moved = {"root": root, "edge": ops.xp(edge).moveaxis(edge, -3, 0)}
    return moved if node is None else {**moved, "node": ops.xp(node).moveaxis(node, -2, 0)}
