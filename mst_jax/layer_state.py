"""The layers' parameters and optimizer state while a loop updates them.

State in host memory comes and goes beside what the loop computes. Layers are updated
from the last to the first; a turn has two halves:

    in the turn of layer i    half A of its state     half B
    first half                layer i + 1 goes        layer i comes
    second half               layer i comes           layer i + 1 goes

So the link is used both ways at once, and no stack is written and read at once: XLA
does not know one row of it from another.
"""

from itertools import zip_longest
from typing import Any, NamedTuple

import jax

from mst_jax.host_memory import (
    early,
    get_rows,
    is_on_host,
    put_rows,
    to_device,
    to_host,
)


class LayerStacks(NamedTuple):
    """Parameters and state of all layers, and the state that is on its way.

    Trees of the state have None where a leaf is elsewhere.
    """

    params: Any
    here: Any
    """State on the device, [L, ...]."""
    away: Any
    """State in host memory, [L, ...]."""
    going: Any
    """On the device, [1, ...]: updated state of the layer whose turn was before."""
    coming: Any
    """On the device, [1, ...]: state of this layer. None but within its turn."""

    @property
    def is_away(self) -> Any:
        """Of every leaf of the state, whether it is in host memory."""
        return jax.tree.map(lambda a: a is None, self.here, is_leaf=lambda a: a is None)


def enter(params: Any, state: Any) -> LayerStacks:
    """Return the stacks for a loop over the layers, from the last one to the first."""
    here, away = split(state, jax.tree.map(is_on_host, state))
    # The first turn puts the last layer's state where it was: see `put_rows`.
    last = jax.tree.map(lambda a: to_device(get_rows(a, len(a) - 1, 1)), away)
    return LayerStacks(params, here, away, last, nothing(away))


def leave(stacks: LayerStacks) -> tuple[Any, Any]:
    """Return parameters and state when layer 0 was the last one updated."""
    away = jax.tree.map(
        lambda a, new: put_rows(a, to_host(new), 0), stacks.away, stacks.going
    )
    return stacks.params, join(stacks.here, away)


def exchange(
    stacks: LayerStacks, i: Any, x: jax.Array, *, half: int
) -> tuple[LayerStacks, jax.Array]:
    """Send the state of layer i + 1 and fetch layer i's, beside what waits for x.

    Args:
        stacks: of `enter`.
        i: the layer, linear in the loop's counter.
        x: any array that what is computed in this half of the turn needs.
        half: 0, and later in the same turn 1.

    Returns:
        (stacks, x).
    """
    away, tree = jax.tree.flatten(stacks.away)
    if not away:
        return stacks, x
    going, coming = map(tree.flatten_up_to, (stacks.going, stacks.coming))
    before = i + 1
    a, b = _halves(away)
    sends, fetches = (a, b) if half == 0 else (b, a)
    # In turns, since XLA spreads copies over its streams in the order they begin.
    for n, m in zip_longest(fetches, sends):
        if n is not None:
            x, away[n] = early(x, away[n], i)
            coming[n] = to_device(get_rows(away[n], i, 1))
        if m is not None:
            # The stack itself stays out of the second barrier: XLA would copy one that
            # may be read after it is written.
            x, new = early(x, going[m], (before, away[m], coming[m]))
            away[m], going[m] = put_rows(away[m], to_host(new), before), None
    away, going, coming = map(tree.unflatten, (away, going, coming))
    return stacks._replace(away=away, going=going, coming=coming), x


def join(here: Any, away: Any) -> Any:
    """Return a state whose leaves are in one of two trees, with None in the other."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, here, away, is_leaf=lambda a: a is None
    )


def split(state: Any, is_away: Any) -> tuple[Any, Any]:
    """Undo `join`.

    Args:
        state: any tree.
        is_away: the same tree of booleans.
    """
    here = jax.tree.map(lambda a, away: None if away else a, state, is_away)
    return here, jax.tree.map(lambda a, away: a if away else None, state, is_away)


def nothing(away: Any) -> Any:
    """Return the tree with None for every leaf."""
    return jax.tree.map(lambda _: None, away)


def _halves(stacks: list[jax.Array]) -> tuple[list[int], list[int]]:
    """Return the indices of two halves of the stacks by bytes, the largest first."""
    halves: tuple[list[int], list[int]] = ([], [])
    for n in sorted(range(len(stacks)), key=lambda n: -stacks[n].nbytes):
        min(halves, key=lambda half: sum(stacks[m].nbytes for m in half)).append(n)
    return halves
