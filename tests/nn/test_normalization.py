"""Norms beyond the matrix: statistics over a mesh, running averages, half precision, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import shardflax.nn as nn
from shardflax.core.errors import FlaxError, ModifyScopeVariableError
from shardflax.partitioning import init_sharded, make_mesh, preset, use
from tests.core.harness import quick_key
from tests.nn.matrix import close, same
from tests.nn.row import floats

KEY = quick_key(0)
X = 2 * floats(8, 4, 6) + 3
MASK = np.random.RandomState(0).rand(8, 4, 1) > 0.4
WRITES = ["batch_stats"]


def trained(layer: Any, variables: Any, *batches: Any, **options: Any) -> Any:
    """Outputs for each batch, and the statistics after them."""
    outputs = []
    for x in batches:
        y, updates = layer.apply(variables, x, mutable=WRITES, **options)
        variables = {**variables, **updates}
        outputs.append(y)
    return outputs, variables["batch_stats"]


@partial(jax.jit, static_argnums=0)
def with_variables(layer: Any) -> tuple[Any, Any]:
    """The variables of a layer, and what it gives and writes for all of `X`."""
    variables = layer.init(KEY, X)
    return variables, layer.apply(variables, X, mutable=WRITES)


# --- the batch on a mesh


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_statistics_are_those_of_the_whole_batch(axis_types: Any) -> None:
    layer = nn.BatchNorm(use_running_average=False)
    _, expected = with_variables(layer)
    mesh = make_mesh("data=2,fsdp=4", axis_types=axis_types)
    rules = preset("fsdp")
    state, _ = init_sharded(lambda: layer.init(KEY, X), mesh=mesh, rules=rules)
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    with use(mesh, rules):
        found = jax.jit(partial(layer.apply, mutable=WRITES))(state, x)
    close(found, expected)
    assert found[0].sharding.spec[0] == ("data", "fsdp")
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found[1]))


def test_parts_of_a_batch_average_over_an_axis() -> None:
    """Under `shard_map`, `axis_name` gives the whole batch's statistics, none the part's."""
    whole = nn.BatchNorm(use_running_average=False)
    variables, expected = with_variables(whole)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def parts(layer: Any) -> Any:
        def part(variables: Any, x: Any) -> Any:
            y, updates = layer.apply(variables, x, mutable=WRITES)
            return y, jax.tree.map(lambda v: v[None], updates)

        specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data")}
        return jax.jit(jax.shard_map(part, mesh=mesh, **specs))(variables, X)

    y, updates = parts(nn.BatchNorm(use_running_average=False, axis_name="data"))
    every = jax.tree.map(lambda v: np.broadcast_to(v, (8, *v.shape)), expected[1])
    close((y, updates), (expected[0], every))
    one = jax.jit(partial(whole.apply, mutable=WRITES))
    alone = [one(variables, x[None])[0] for x in np.asarray(X)]
    close(parts(whole)[0], np.concatenate(alone))


@pytest.mark.parametrize("norm", ["BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm"])
def test_axis_names_and_groups_are_flax_s(norm: str) -> None:
    """Over a mapped axis: its size is 8, in two groups or as one."""
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def run(namespace: Any, axis_index_groups: Any) -> Any:
        options: dict[str, Any] = {"use_running_average": False} if norm == "BatchNorm" else {}
        if norm == "GroupNorm":
            options["num_groups"] = 3
        make = partial(getattr(namespace, norm), **options)
        layer = make(axis_name="parts", axis_index_groups=axis_index_groups)
        variables = jax.jit(make().init)(KEY, X[0])
        call = partial(layer.apply, mutable=WRITES)
        mapped = jax.pmap if axis_index_groups else jax.vmap
        return jax.jit(mapped(call, in_axes=(None, 0), axis_name="parts"))(variables, X)

    for given in (None, groups):
        same(run(nn, given), run(flax.linen, given))


# --- running statistics


def test_running_statistics_over_steps_are_flax_s() -> None:
    def run(namespace: Any) -> Any:
        layer = namespace.BatchNorm(momentum=0.7, epsilon=1e-3)
        variables = layer.init(KEY, X, use_running_average=False)
        outputs, stats = trained(layer, variables, X, X + 1, -X, use_running_average=False)
        given = {**variables, "batch_stats": stats}
        return outputs, stats, layer.apply(given, X, use_running_average=True)

    same(*[jax.jit(partial(run, namespace))() for namespace in (nn, flax.linen)])


def test_statistics_that_may_not_change() -> None:
    layer = nn.BatchNorm(use_running_average=False)
    variables = jax.eval_shape(layer.init, KEY, X)
    with pytest.raises(ModifyScopeVariableError, match="batch_stats"):
        jax.eval_shape(layer.apply, variables, X)
    with pytest.raises(FlaxError, match="'use_running_average' was given neither"):
        jax.eval_shape(nn.BatchNorm().init, KEY, X)
    with pytest.raises(FlaxError, match="'use_running_average' was given both"):
        jax.eval_shape(lambda: layer.init(KEY, X, use_running_average=True))


def test_init_does_not_count_as_a_step() -> None:
    stats = with_variables(nn.BatchNorm(use_running_average=False))[0]["batch_stats"]
    same(stats, {"mean": jnp.zeros(6), "var": jnp.ones(6)})


# --- what moments are taken of


def test_a_mask_leaves_elements_out() -> None:
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(KEY, X)
    call = jax.jit(partial(layer.apply, mutable=WRITES))
    y, stats = call(variables, X, mask=MASK)
    seen = np.asarray(X)[MASK[..., 0]]
    close((np.asarray(y)[MASK[..., 0]], stats), call(variables, seen))
    # A mask of one feature is one of all, in GroupNorm too (Flax wants it written out).
    groups = nn.GroupNorm(num_groups=3)
    variables = groups.init(KEY, X)
    call = jax.jit(groups.apply)
    whole = call(variables, X, mask=np.broadcast_to(MASK, X.shape))
    close(call(variables, X, mask=MASK), whole)


@pytest.mark.parametrize("fast", [True, False])
def test_masks_and_both_variances_are_flax_s(fast: bool) -> None:
    """Every norm, with a mask and without one, in one pass and in two; half precision too."""
    options: dict[str, dict[str, Any]] = {
        "BatchNorm": {"use_running_average": False},
        "GroupNorm": {"num_groups": 3},
        "InstanceNorm": {},
        "LayerNorm": {},
        "RMSNorm": {},
    }
    inputs = X, X.astype(jnp.bfloat16), X * (1 + 1j)
    kinds = jnp.bool_, jnp.float32, jnp.int32  # of masks: what is not zero counts

    def run(namespace: Any) -> Any:
        found = {}
        for name, fixed in options.items():
            layer = getattr(namespace, name)(use_fast_variance=fast, **fixed)
            variables = layer.init(KEY, X)
            for x, kind in zip(inputs, kinds, strict=True):
                mask = jnp.broadcast_to(MASK, x.shape).astype(kind)
                ways = [layer.apply(variables, x, mask=m, mutable=WRITES) for m in (None, mask)]
                found[name, str(x.dtype)] = ways
        return list(found.values())

    same(*[jax.jit(partial(run, namespace))() for namespace in (nn, flax.linen)])


NORMS: dict[str, Callable[[Any], Any]] = {
    "BatchNorm": lambda nn: nn.BatchNorm(use_running_average=False, dtype=jnp.float16),
    "GroupNorm": lambda nn: nn.GroupNorm(num_groups=2, dtype=jnp.float16),
    "InstanceNorm": lambda nn: nn.InstanceNorm(dtype=jnp.float16),
    "LayerNorm": lambda nn: nn.LayerNorm(dtype=jnp.float16),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_half_precision_do_not_overflow(name: str) -> None:
    """Squares of these are beyond float16; statistics are float32."""
    x = (1000 * floats(8, 4, 6)).astype(jnp.float16)
    y, variables = jax.jit(NORMS[name](nn).init_with_output)(KEY, x)
    assert y.dtype == jnp.float16 and np.isfinite(y).all() and 0.8 < float(jnp.std(y)) < 1.2
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))


COMPLEX = {
    "BatchNorm": lambda nn: nn.BatchNorm(use_running_average=False),
    "GroupNorm": lambda nn: nn.GroupNorm(num_groups=2),
    "InstanceNorm": lambda nn: nn.InstanceNorm(use_fast_variance=False),
    "LayerNorm": lambda nn: nn.LayerNorm(),
}


def test_complex_inputs_are_flax_s() -> None:
    x = X + 1j * floats(8, 4, 6, seed=1)

    def run(namespace: Any) -> Any:
        layers = {name: make(namespace) for name, make in COMPLEX.items()}
        found = {}
        for name, layer in layers.items():
            variables = layer.init(KEY, x)
            found[name] = variables, layer.apply(variables, x, mutable=WRITES)
        return found

    found, theirs = (jax.jit(partial(run, namespace))() for namespace in (nn, flax.linen))
    same(found, theirs)
    y = np.asarray(found["LayerNorm"][1][0])
    close(np.mean(np.abs(y) ** 2, axis=-1), np.ones((8, 4)), tolerance=1e-3)


# --- norms of weights


def test_weights_of_nested_layers_are_flax_s() -> None:
    """Paths, the order of keys, and which parameters are meant."""

    def run(namespace: Any) -> Any:
        dense = partial(namespace.DenseGeneral, kernel_init=jax.nn.initializers.uniform(1.0))

        class Pair(namespace.Module):
            @namespace.compact
            def __call__(self, x: Any) -> Any:
                return dense((2, 2), name="query")(dense(5, name="value")(x))

        class Model(namespace.Module):
            @namespace.compact
            def __call__(self, x: Any) -> Any:
                x = namespace.SpectralNorm(Pair())(x, update_stats=True)
                few = namespace.WeightNorm(Pair(), variable_filter={"query", "value/bias"})
                x = namespace.WeightNorm(dense(4, axis=(-2, -1)), feature_axes=None)(few(x))
                x = namespace.WeightNorm(dense(3), use_scale=False)(x)
                x = namespace.SpectralNorm(dense(3), n_steps=0)(x, update_stats=True)
                return namespace.SpectralNorm(dense(4), name="last")(x, update_stats=False)

        def twice() -> Any:
            variables = Model().init(KEY, X)
            return variables, Model().apply(variables, X, mutable=True)

        return jax.jit(twice)()

    same(run(nn), run(flax.linen))


def test_the_largest_singular_value_becomes_one() -> None:
    layer = nn.SpectralNorm(nn.Dense(5, use_bias=False))
    variables = jax.jit(partial(layer.init, update_stats=True))(KEY, X)
    step = jax.jit(partial(layer.apply, update_stats=True, mutable=WRITES))
    for _ in range(30):
        variables = {**variables, **step(variables, jnp.eye(6))[1]}
    kernel = jax.jit(partial(layer.apply, update_stats=False))(variables, jnp.eye(6))
    assert float(np.linalg.norm(kernel, 2)) == pytest.approx(1.0, abs=1e-3)


def test_complex_weights_are_taken_by_their_absolute_values() -> None:
    kernel = floats(6, 4) + 1j * floats(6, 4, seed=1)
    dense = nn.Dense(4, use_bias=False, param_dtype=jnp.complex64)
    params = {"layer_instance": {"kernel": kernel}}
    spectral, columns = nn.SpectralNorm(dense, n_steps=60), nn.WeightNorm(dense, use_scale=False)
    run = partial(spectral.apply, update_stats=True, mutable=True, rngs=KEY)
    found, _ = jax.jit(run)({"params": params}, jnp.eye(6))
    close(found, kernel / np.linalg.norm(kernel, 2), tolerance=1e-3)
    found = jax.jit(columns.apply)({"params": params}, jnp.eye(6))
    close(np.linalg.norm(found, axis=0), np.ones(4), tolerance=1e-5)


# --- nothing besides, and errors


def primitives(fn: Callable[..., Any], *args: Any) -> list[str]:
    return [str(eqn.primitive) for eqn in jax.make_jaxpr(fn)(*args).eqns]


def test_nothing_is_computed_besides_the_norm() -> None:
    layer = nn.BatchNorm(use_running_average=True)
    variables = jax.eval_shape(layer.init, KEY, X)

    def by_hand(variables: Any, x: Any) -> Any:
        params, stats = variables["params"], variables["batch_stats"]
        scale, bias = (jnp.reshape(params[name], (1, 1, -1)) for name in ("scale", "bias"))
        mean, var = (jnp.expand_dims(stats[name], (0, 1)) for name in ("mean", "var"))
        return (x - mean) * (lax.rsqrt(var + 1e-5) * scale) + bias

    assert sorted(primitives(layer.apply, variables, X)) == sorted(
        primitives(by_hand, variables, X)
    )


def call(make: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return make(name="inner")(x, **options)

    return lambda: jax.eval_shape(Model().init, KEY, X)


ERRORS: list[tuple[Callable[[], Any], str]] = [
    (call(partial(nn.GroupNorm, 4)), "dim -1 of inputs has size 6, .* num_groups=4 .remainder 2"),
    (call(partial(nn.GroupNorm, None, 4)), "size 6, which is no multiple of group_size=4"),
    (call(partial(nn.GroupNorm, 2, 3)), "num_groups=2 and group_size=3: give exactly one"),
    (call(partial(nn.GroupNorm, None)), "num_groups=None and group_size=None"),
    (call(partial(nn.GroupNorm, 2, reduction_axes=1)), "the last dim must be one of them"),
    (call(partial(nn.GroupNorm, 2), mask=MASK[:, :3]), "dim -2: 3 against 4"),
    (call(partial(nn.InstanceNorm, feature_axes=(0, -1))), "dim 0 is the batch"),
    (call(partial(nn.InstanceNorm), mask=MASK[:5]), "dim -3: 5 against 8"),
    (call(partial(nn.BatchNorm, False, axis=3)), r"axis=\(3,\) .* dim 3 does not exist"),
    (call(partial(nn.BatchNorm, False), mask=MASK[:5]), "dim -3: 5 against 8"),
    (call(partial(nn.WeightNorm, nn.Dense(2), feature_axes=2)), "dim 2 does not exist"),
    (
        call(
            partial(nn.SpectralNorm, nn.Conv(2, (2,)), error_on_non_matrix=True), update_stats=True
        ),
        r"kernel' have shape \(2, 6, 2\) \(3 dims\), expected a matrix",
    ),
]


@pytest.mark.parametrize(("fails", "message"), ERRORS)
def test_errors_name_the_layer_the_dim_and_the_sizes(fails: Any, message: str) -> None:
    with pytest.raises(FlaxError, match=message) as caught:
        fails()
    assert "'inner'" in str(caught.value) and isinstance(caught.value, ValueError)
