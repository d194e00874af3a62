"""What a compiled program holds whole, or in another layout than was said, is found."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.partitioning import (
    Layout,
    SilentReplicationError,
    abstract_layout,
    assert_compiled,
    batch_sharding,
    check_compiled,
    make_mesh,
    preset,
    use,
)

P = jax.P
MESH, RULES = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp")
KEY = jax.ShapeDtypeStruct((2,), "uint32")


class Model(nn.Module):
    free: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Dense(32, kernel_axes=("embed", "mlp"), name="up")(x))
        h = nn.Dense(16, kernel_axes=("mlp", "embed"), name="down", use_bias=False)(h)
        if self.free:
            h = h @ self.param("free", jax.nn.initializers.ones, (16, 16))
        return h


def laid_out(model: Any) -> Layout:
    def init(key: Any) -> Any:
        return model.init(jax.random.wrap_key_data(key, impl="threefry2x32"), jnp.ones((8, 16)))

    return abstract_layout(init, KEY, mesh=MESH, rules=RULES)


def step(model: Any, state: Any, batch: Any, out: Any = None, **options: Any) -> Any:
    """The lowered step that subtracts gradients, for abstract arguments."""

    def run(state: Any, x: Any) -> Any:
        grads = jax.grad(lambda s: model.apply(s, x).sum())(state)
        return jax.tree.map(jnp.subtract, state, grads)

    x = jax.ShapeDtypeStruct((8, 16), "float32", sharding=batch)
    with use(MESH, RULES):
        return jax.jit(run, out_shardings=out, **options).lower(state, x)


def test_a_program_that_follows_its_layout_has_nothing_to_hide() -> None:
    layout = laid_out(Model())
    batch = batch_sharding(MESH, RULES)
    lowered = step(Model(), layout.abstract, batch, layout.shardings, donate_argnums=0)
    assert_compiled(lowered.compile(), layout, lowered=lowered, above=0)


def test_arguments_and_results_that_lie_otherwise() -> None:
    layout = laid_out(Model())
    whole = jax.NamedSharding(MESH, P())
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), layout.abstract
    )
    compiled = step(Model(), state, whole, whole).compile()
    found = check_compiled(compiled, layout, above=0)
    by_path = {(f.what, f.path): f for f in found}
    kernel = by_path["argument", "params/up/kernel"]
    assert (kernel.asked, kernel.found) == (P("fsdp", "tensor"), P())
    assert (kernel.bytes, kernel.wasted) == (16 * 32 * 4, 16 * 32 * 4 * 7 // 8)
    assert ("result", "params/up/kernel") in by_path
    batch = by_path["argument", "args/1"]
    assert batch.asked is None and "batch_sharding(mesh, rules)" in batch.cure
    assert found == sorted(found, key=lambda f: -f.wasted)
    with pytest.raises(SilentReplicationError) as error:
        assert_compiled(compiled, layout)
    text = str(error.value)
    assert "params/down/kernel, argument (32, 16): 2048 B on each device" in text
    assert "Asked: P('tensor', 'fsdp'), found: P()" in text and "init_sharded" in text
    assert len(error.value.findings) == 6  # three parameters, coming and going
    assert_compiled(compiled, layout, accept=("params/*",))


def test_weights_that_nothing_names_or_whose_rules_come_to_nothing() -> None:
    layout = laid_out(Model(free=True))
    nothing: Any = jax.jit(lambda: 0).lower().compile()
    (found,) = check_compiled(nothing, layout, above=100)
    assert (found.path, found.bytes, found.wasted) == ("params/free", 1024, 896)
    assert "nothing names its dims" in found.why and "kernel_axes" in found.cure
    assert check_compiled(nothing, layout, above=896) == []
    box = {"w": nn.LogicallyPartitioned(jnp.ones((7, 7)), ("embed", "kv_heads"))}
    (odd,) = check_compiled(nothing, Layout(box, make_mesh("tensor=8"), RULES), above=0)
    assert "('embed', 'kv_heads') resolve to nothing" in odd.why and "tensor (" in odd.why
    said = {"w": nn.LogicallyPartitioned(jnp.ones((8, 8)), (None, "norm"))}
    assert check_compiled(nothing, Layout(said, MESH, RULES), above=0) == []


def test_products_that_every_device_does_in_full() -> None:
    layout = Layout({}, MESH, RULES)

    def head(w: Any, x: Any, out: Any) -> Any:
        with jax.named_scope("head"):
            return jax.lax.with_sharding_constraint(x @ w, out) if out else jnp.sin(x @ w).sum()

    def found(spec: Any, out: Any = None) -> Any:
        sharding = jax.NamedSharding(MESH, spec)
        x = jax.ShapeDtypeStruct((16, 16), "float32", sharding=sharding)
        w = jax.ShapeDtypeStruct((16, 16), "float32", sharding=jax.NamedSharding(MESH, P()))
        out = out and jax.NamedSharding(MESH, out)
        lowered = jax.jit(head, static_argnums=2).lower(w, x, out)
        every = check_compiled(lowered.compile(), layout, lowered=lowered, above=0)
        return [f for f in every if f.what == "operation"]

    (one,) = found(P())
    assert (one.path, one.shape, one.wasted) == ("head", (16, 16), 1024 - 128)
    assert "8 devices each do the same part of this dot_general (test_replication.py:" in one.why
    assert found(P("fsdp")) == []  # cut somehow, and nobody asked for more
    assert found(P("fsdp"), P("fsdp", "tensor")) == []
    assert found(P(None, "fsdp"), P("tensor")) == []  # a sum of parts is work that is shared


def test_values_that_every_device_holds_whole() -> None:
    """A sorted table; neither what is cut, nor gathered weights."""

    def score(w: Any, x: Any, table: Any) -> Any:
        with jax.named_scope("sampling"):
            return jnp.sort(x @ w) + jax.lax.sort(table)[0]

    rows, whole = (jax.NamedSharding(MESH, spec) for spec in (P("fsdp"), P()))
    w = jax.ShapeDtypeStruct((32, 32), "float32", sharding=rows)
    x = jax.ShapeDtypeStruct((8, 32), "float32", sharding=rows)
    table = jax.ShapeDtypeStruct((40,), "float32", sharding=whole)
    lowered = jax.jit(score).lower(w, x, table)
    box = {"w": nn.LogicallyPartitioned(jnp.ones((32, 32)), ("embed", None))}
    layout = Layout(box, MESH, RULES)
    compiled = lowered.compile()
    found = check_compiled(compiled, layout, lowered=lowered, above=0)
    assert {(f.what, f.path, f.shape) for f in found} == {
        ("argument", "args/2", (40,)),
        ("value", "sampling", (40,)),
    }
    (one,) = (f for f in found if f.what == "value")
    assert "every device holds the whole result of this" in one.why
    assert "(test_replication.py:" in one.why and "by its names" in one.cure
    assert check_compiled(compiled, layout, lowered=lowered, above=40 * 4) == []


def test_donated_buffers_without_a_use() -> None:
    layout = Layout({}, MESH, RULES)
    x = jax.ShapeDtypeStruct((8, 4), "float32", sharding=jax.NamedSharding(MESH, P("fsdp")))
    compiled = jax.jit(lambda x, y: x.sum() + y, donate_argnums=(0, 1)).lower(x, x).compile()
    (found,) = check_compiled(compiled, layout, above=0)
    assert found.what == "donation" and found.path.startswith("args/") and found.bytes == 32
    kept = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert check_compiled(kept, layout, above=0) == []
