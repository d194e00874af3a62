"""Utilities over several devices, and evaluation by shape.

Linen has these for `jax.pmap`: arrays with a leading dim of one slice per device.  They work on
such arrays here too, which are sharded over a mesh of one axis.  New programs shard the batch
itself and compile with `jax.jit`, and need none of them.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardflax.core.staging import jx, known

__all__ = [
    "pad_shard_unpad",
    "partial_eval_by_shape",
    "pmean",
    "prefetch_to_device",
    "replicate",
    "scan_in_dim",
    "unreplicate",
]


def _per_device(devices: Sequence[Any] | None) -> tuple[int, NamedSharding]:
    """The number of devices, and the sharding of a leading dim of that size."""
    devices = jax.local_devices() if devices is None else devices
    mesh = Mesh(np.asarray(devices), ("devices",))
    return len(devices), NamedSharding(mesh, PartitionSpec("devices"))


def replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """Each array of `tree` with a new leading dim: one copy on each of `devices`.

    The default is all devices of this process.

    >>> replicate({"w": jnp.ones(3)}, jax.local_devices()[:2])["w"].shape
    (2, 3)
    """
    count, sharding = _per_device(devices)

    def copies(x: Any) -> jax.Array:
        return jnp.broadcast_to(x, (count, *x.shape))

    return jax.tree.map(lambda x: jax.device_put(copies(jnp.asarray(x)), sharding), tree)


def unreplicate(tree: Any) -> Any:
    """The first of the copies that `replicate` made.

    >>> unreplicate(replicate({"w": jnp.ones(3)}))["w"].shape
    (3,)
    """
    return jax.tree.map(_first, tree)


def _first(x: Any) -> Any:
    # Without this, slicing would bring every copy together.
    if isinstance(x, jax.Array) and not isinstance(x, jx.core.Tracer):
        shards = x.addressable_shards
        return next((s.data[0] for s in shards if (s.index[0].start or 0) == 0), x[0])
    return x[0]


def pmean(xs: Any, axis_name: str) -> Any:
    """The mean of each array over a mapped axis, as `jax.lax.pmean`.

    >>> jax.vmap(lambda x: pmean({"x": x}, "batch"), axis_name="batch")(jnp.array([1.0, 3.0]))
    {'x': Array([2., 2.], dtype=float32)}
    """
    return jax.lax.pmean(xs, axis_name)


def partial_eval_by_shape(
    fn: Callable[..., Any], input_spec: Iterable[Any], *args: Any, **kwargs: Any
) -> Any:
    """`fn(*inputs, *args, **kwargs)` for inputs of which only shapes are known.

    `input_spec` holds shapes (of float32) or pairs `(shape, dtype)`.  Outputs that do not depend on
    the values of the inputs are computed; the others are `jax.ShapeDtypeStruct`.

    >>> partial_eval_by_shape(lambda x: (x + 1, jnp.zeros(x.shape[0])), [(2, 3)])
    (ShapeDtypeStruct(shape=(2, 3), dtype=float32), Array([0., 0.], dtype=float32))
    """
    return known(fn, *map(_shape, input_spec), *args, **kwargs)


def _shape(spec: Any) -> jax.ShapeDtypeStruct:
    if len(spec) == 2 and isinstance(spec[0], tuple | list):
        return jax.ShapeDtypeStruct(tuple(spec[0]), spec[1])
    return jax.ShapeDtypeStruct(tuple(spec), jnp.float32)


def prefetch_to_device(
    iterator: Iterator[Any], size: int, devices: Sequence[Any] | None = None
) -> Iterator[Any]:
    """The batches of `iterator`, each put on `devices` `size` steps before it is used.

    The leading dim of each array is split over the devices, one or more slices each.

    >>> batches = iter([{"x": np.ones((8, 2))}] * 3)
    >>> [batch["x"].shape for batch in prefetch_to_device(batches, size=2)]
    [(8, 2), (8, 2), (8, 2)]
    """
    sharding = _per_device(devices)[1]
    queue: collections.deque[Any] = collections.deque()
    for batch in iterator:
        queue.append(jax.device_put(batch, sharding))
        if len(queue) >= max(1, size):
            yield queue.popleft()
    yield from queue


# --- scan


def scan_in_dim(
    body_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    axis: int | Sequence[int] = (0,),
    unroll: int | Sequence[int] = (1,),
    keepdims: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan` over other dims than the first, or several, the first of `axis` outermost.

    `body_fn` sees its inputs without those dims, or with `keepdims` of size 1; outputs are stacked
    along the same dims.

    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> total, doubled = scan_in_dim(lambda c, x: (c + x.sum(), 2 * x), 0.0, x, axis=1)
    >>> float(total), doubled.shape
    (15.0, (2, 3))
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    unrolls = (unroll,) * len(axes) if isinstance(unroll, int) else tuple(unroll)
    if len(unrolls) == 1:
        unrolls = unrolls * len(axes)
    front = tuple(range(len(axes)))

    def one(carry: Any, x: Any) -> tuple[Any, Any]:
        if keepdims:
            x = jax.tree.map(lambda x: jnp.expand_dims(x, axes), x)
        carry, y = body_fn(carry, x)
        return carry, jax.tree.map(lambda y: jnp.squeeze(y, axes), y) if keepdims else y

    body: Any = one
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, axes, front), xs)
    for times in reversed(unrolls):
        body = functools.partial(_scan, body, times)
    carry, ys = body(init, xs)
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, front, axes), ys)


def _scan(body: Callable[..., Any], unroll: int, carry: Any, xs: Any) -> tuple[Any, Any]:
    return jax.lax.scan(body, carry, xs, unroll=unroll)


# --- batches of any size


def pad_shard_unpad(
    wrapped: Callable[..., Any],
    static_argnums: Sequence[int] = (0,),
    static_argnames: Sequence[str] = (),
    static_return: bool = False,
) -> Callable[..., Any]:
    """`wrapped` for batches of any size, of which it gets `(devices, batch / devices, ...)`.

    Arrays are padded with zeros on the host up to a multiple of the number of local devices, and of
    `min_device_batch` rows per device, a keyword of the new function, if that is given.  Arguments
    named by `static_argnums` and `static_argnames` are passed on as they are; so is the result,
    with `static_return`.  Otherwise it comes back on the host, without the padding.  Raises
    ValueError if the arrays have different batch sizes.

    >>> double = pad_shard_unpad(lambda params, x: params * x)
    >>> double(2, np.arange(3)).tolist()
    [0, 2, 4]
    """

    def call(*args: Any, min_device_batch: int | None = None, **kwargs: Any) -> Any:
        count = jax.local_device_count()
        batch = _batch_size(
            [a for i, a in enumerate(args) if i not in static_argnums],
            {k: v for k, v in kwargs.items() if k not in static_argnames},
        )
        rows = max(-(-batch // count), min_device_batch or 0)

        def shard(x: Any) -> Any:
            return _padded(np.asarray(x), count * rows).reshape(count, rows, *np.shape(x)[1:])

        sharded = [a if i in static_argnums else jax.tree.map(shard, a) for i, a in enumerate(args)]
        named = {
            k: v if k in static_argnames else jax.tree.map(shard, v) for k, v in kwargs.items()
        }
        result = wrapped(*sharded, **named)
        return result if static_return else jax.tree.map(lambda y: _unpadded(y, batch), result)

    return functools.update_wrapper(call, wrapped)


def _batch_size(*trees: Any) -> int:
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(trees)}
    if len(sizes) != 1:
        raise ValueError(f"pad_shard_unpad: one batch size is expected; got {sorted(sizes)}.")
    return sizes.pop()


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _unpadded(y: Any, batch: int) -> np.ndarray:
    y = np.asarray(y)
    return y.reshape(-1, *y.shape[2:])[:batch]
