"""Attention on TPU without its matrix of weights: JAX's splash attention kernel (Pallas)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from shardflax.nn import _names as names
from shardflax.nn.errors import AttentionOptionsError
from shardflax.nn.types import Array, Names
from shardflax.partitioning.explicit_out import explicit_axes
from shardflax.partitioning.resolve import resolve
from shardflax.partitioning.rules import AxisRules
from shardflax.partitioning.scope import axis_kinds, free_axes, mesh_in_scope, rules_in_scope

__all__ = ["Flash", "flash_attention", "spreads", "target_device", "why_not_flash"]

BLOCKS = (512, 256, 128)
Window = tuple[int | None, int | None]


def target_device() -> Any:
    """A device of those that will run what is traced now: of the mesh in scope, or the default.

    Inside `jax.jit` a mesh has no devices but says what they are: so a program for the topology of
    a TPU is the same on any host.  Of GPUs it does not say which instructions they have.

    >>> target_device().platform
    'cpu'
    """
    mesh = mesh_in_scope()
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    described = getattr(mesh, "abstract_device", None)
    if described is None or described.platform == jax.default_backend() == "gpu":
        return jax.devices()[0]
    return described


def why_not_flash(
    query: Array, key: Array, value: Array, query_axes: Names | None = None
) -> str | None:
    """What keeps these `(batch, length, heads, depth)` from the kernel; None if nothing does.

    `query_axes` are the names of the dims of `query`: each device has whole lengths and depths.

    >>> x = jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.bfloat16)
    >>> why_not_flash(x, x, x)
    'lengths must be multiples of 128, found 100 and 100'
    """
    lengths = query.shape[-3], key.shape[-3]
    if query.ndim != 4:
        return f"it wants (batch, length, heads, depth), found {query.ndim} dims"
    if lengths[0] % BLOCKS[-1] or lengths[1] % BLOCKS[-1]:
        return f"lengths must be multiples of {BLOCKS[-1]}, found {lengths[0]} and {lengths[1]}"
    if query.shape[-1] % 64 or value.shape[-1] != query.shape[-1]:
        depths = query.shape[-1], value.shape[-1]
        return f"the depths of heads must be one multiple of 64, found {depths[0]} and {depths[1]}"
    return _cut(query, _spec(query, query_axes))


def _cut(query: Array, spec: PartitionSpec | None) -> str | None:
    """What of the length or the depth is spread, if anything is."""
    for dim in (1, 3):
        if spec is not None and spec[dim] is not None:
            what = f"dim {dim} of the query, of size {query.shape[dim]}"
            return f"{what}, is spread over {spec[dim]!r} and must be whole on each device"
    return None


@dataclass(frozen=True)
class Flash:
    """What the kernel is compiled for, but for shapes.

    >>> Flash(causal=True).window
    (None, None)
    """

    causal: bool
    window: Window = (None, None)
    softcap: float | None = None
    interpret: bool = False

    def __call__(self, query: Array, key: Array, value: Array) -> Array:
        """Attention on one device, `(batch, length, heads, depth)`; see `flash_attention`."""
        batch, length, heads, depth = query.shape
        kv_heads = key.shape[-2]
        scale = jnp.asarray(depth**-0.5, jnp.float32)
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
        grouped = jnp.reshape(query, (batch, length, kv_heads, heads // kv_heads, depth))
        kernel = self._kernel(length, key.shape[-3], heads // kv_heads)
        # Over the batch and the key/value heads: (group, length, depth) against (keys, depth).
        every = jax.vmap(jax.vmap(kernel))
        y = every(
            jnp.transpose(grouped, (0, 2, 3, 1, 4)),
            jnp.swapaxes(key, 1, 2),
            jnp.swapaxes(value, 1, 2),
        )
        y = jnp.transpose(y, (0, 3, 1, 2, 4))
        return jnp.reshape(y, (batch, length, heads, depth)).astype(query.dtype)

    def _kernel(self, queries: int, keys: int, group: int) -> Any:
        """The kernel of one key/value head."""
        # Pallas takes a while to import, and is for TPUs alone.
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        heads = splash.MultiHeadMask([self._mask(splash, queries, keys)] * group)
        q, kv = _block(queries), _block(keys)
        sizes = splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        )
        return splash.make_splash_mqa_single_device(
            heads,
            block_sizes=sizes,
            attn_logits_soft_cap=self.softcap,
            interpret=self.interpret,
        )

    def _mask(self, splash: Any, queries: int, keys: int) -> Any:
        shape = (queries, keys)
        if self.window != (None, None):
            left, right = self.window
            return splash.LocalMask(shape, (left, 0 if self.causal else right), 0)
        return splash.CausalMask(shape) if self.causal else splash.FullMask(shape)


@lru_cache
def _block(length: int) -> int:
    return next(b for b in BLOCKS if length % b == 0)


def flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = True,
    window: Window = (None, None),
    softcap: float | None = None,
    query_axes: Names | None = None,
    interpret: bool = False,
) -> Array:
    """Attention `(batch, length, heads, depth)` in blocks that fit on the chip (arXiv:2205.14135).

    `key` and `value` may have fewer heads, each for a group of query heads.  A compiler cannot
    spread a kernel over a mesh: under strict rules each device runs it on its part of the batch
    and the heads, which `query_axes` say (names of the dims of `query`).  `window` counts the
    tokens to the left and right that are seen, `softcap` bounds the scores.  `interpret` runs the
    kernel step by step, on any device.  A length or depth that is spread is an
    `AttentionOptionsError`.

    >>> q, kv = jnp.ones((1, 256, 4, 64)), jnp.ones((1, 128, 2, 64))
    >>> jax.eval_shape(flash_attention, q, kv, kv).shape
    (1, 256, 4, 64)
    """
    kernel = Flash(causal, window, softcap, interpret)
    mesh, spec = mesh_in_scope(), _spec(query, query_axes)
    if mesh is None or spec is None:
        return kernel(query, key, value)
    if why := _cut(query, spec):
        raise AttentionOptionsError("flash_attention", f"{why}.")
    if spec[2] is not None and key.shape[2] != query.shape[2]:
        key, value = (_for_each_head(x, query, spec[2], mesh) for x in (key, value))
    if explicit_axes():
        query, key, value = (jax.sharding.reshard(x, spec) for x in (query, key, value))
    return _spread(kernel, mesh, spec, query, key, value)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _spread(
    kernel: Flash, mesh: Any, spec: PartitionSpec, query: Array, key: Array, value: Array
) -> Array:
    """`kernel` on the part of each device.

    With a backward pass of its own: JAX cannot look into a kernel to see that devices along an axis
    which `spec` does not name compute the same, and would sum their gradients over that axis.
    """
    return _on_parts(kernel, mesh, (spec,) * 3, spec)(query, key, value)


def _on_parts(fn: Any, mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _spread_fwd(
    kernel: Flash, mesh: Any, spec: PartitionSpec, query: Array, key: Array, value: Array
) -> tuple[Array, Any]:
    def forward(*operands: Array) -> tuple[Array, Any]:
        y, pullback = jax.vjp(kernel, *operands)
        return y, jax.tree.map(lambda kept: kept[None], pullback)

    out_specs = spec, _each_its_own(mesh)
    return _on_parts(forward, mesh, (spec,) * 3, out_specs)(query, key, value)


def _spread_bwd(kernel: Flash, mesh: Any, spec: PartitionSpec, pullback: Any, g: Array) -> Any:
    def backward(pullback: Any, g: Array) -> Any:
        return jax.tree.map(lambda kept: kept[0], pullback)(g)

    in_specs = _each_its_own(mesh), spec
    return _on_parts(backward, mesh, in_specs, (spec,) * 3)(pullback, g)


_spread.defvjp(_spread_fwd, _spread_bwd)


def _each_its_own(mesh: Any) -> PartitionSpec:
    """What a device keeps for its backward pass, along a dim of all devices."""
    return PartitionSpec(mesh.axis_names)


def _for_each_head(x: Array, query: Array, axes: Any, mesh: Any) -> Array:
    """`x` with heads that the axes of the query's heads divide, repeated if they do not yet."""
    sizes = dict(free_axes(mesh))
    parts = 1
    for axis in (axes,) if isinstance(axes, str) else axes:
        parts *= sizes[axis]
    return x if x.shape[2] % parts == 0 else jnp.repeat(x, query.shape[2] // x.shape[2], axis=2)


def _spec(query: Array, axes: Names | None) -> PartitionSpec | None:
    """Where the dims of `query` lie under strict rules; None where nothing is to be spread."""
    rules, mesh = rules_in_scope(), mesh_in_scope()
    if mesh is None or not isinstance(rules, AxisRules) or axes is None:
        return None
    if all(size == 1 for _, size in free_axes(mesh)):
        return None
    fitting = names.said(query.shape, axes) or (None,) * query.ndim
    plain = [None if n is PartitionSpec.UNCONSTRAINED else n for n in fitting]
    found = resolve(tuple(plain), rules, query.shape, free_axes(mesh)).spec
    return PartitionSpec(*found, *[None] * (query.ndim - len(found)))


def spreads(query: Array, axes: Names | None) -> bool:
    """Whether the kernel can be where `query` is: on one device, or spread by batch and heads.

    >>> spreads(jnp.ones((2, 128, 2, 64)), ("batch", "length", "act_heads", None))
    False
    """
    mesh, spec = mesh_in_scope(), _spec(query, axes)
    if spec is not None:
        return spec[1] is None and spec[3] is None
    if mesh is None:
        return jax.device_count() == 1
    return all(kind == AxisType.Manual or size == 1 for (_, kind), size in _sized(mesh))


def _sized(mesh: Any) -> Any:
    return zip(axis_kinds(mesh), mesh.axis_sizes, strict=True)
