"""Attention beyond the matrix: the reference, caches, rotary positions."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax.nn._grouped import Attention, _cudnn_knows
from shardflax.nn.errors import AttentionOptionsError
from shardflax.nn.flash import Flash, why_not_flash
from shardflax.partitioning import collectives, make_mesh, preset, use
from tests.core.harness import quick_key

KEY = jax.random.key(0)


def floats(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


X = floats(2, 6, 8)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_jax_s_attention_equals_the_reference(kv_heads: int, causal: bool) -> None:
    layer = nn.GroupedQueryAttention(4, num_kv_heads=kv_heads, causal=causal)
    ways = layer, layer.clone(implementation="reference")
    masks = None, floats(2, 4, 6, 6) > -0.5

    @jax.jit
    def both() -> Any:
        variables = layer.init(quick_key(0), X)
        return [[way.apply(variables, X, mask=mask) for mask in masks] for way in ways]

    jax.tree.map(close, *both())


def test_the_reference_equals_full_heads() -> None:
    q, k, v = floats(2, 6, 4, 8), floats(2, 6, 2, 8, seed=1), floats(2, 6, 2, 8, seed=2)

    @jax.jit
    def both() -> Any:
        mask = nn.make_causal_mask(X[..., 0])
        repeated = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        return nn.dot_product_attention(q, *repeated, mask=mask), Attention("here").reference(
            q, k, v
        )

    full, grouped = both()
    close(grouped, full)


OPTIONS: list[dict[str, Any]] = [
    {"window": 2},
    {"window": (1, 3), "causal": False},
    {"logit_softcap": 0.5},
    {"logit_softcap": 0.5, "window": (2, 0)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_windows_and_caps(options: dict[str, Any]) -> None:
    """The layer against the formula over all tokens, and in one pass against decoding."""
    q, k, v = floats(2, 6, 4, 4), floats(2, 6, 2, 4, seed=1), floats(2, 6, 2, 4, seed=2)
    window = options.get("window", 9)
    left, right = (window, window) if isinstance(window, int) else window
    causal, cap = options.get("causal", True), options.get("logit_softcap")
    window = (left, right) if "window" in options else (None, None)

    @jax.jit
    def ways() -> Any:
        scores = jnp.einsum("bqkgd,bskd->bkgqs", q.reshape(2, 6, 2, 2, 4), k) / 2
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        ahead = np.arange(6)[None, :] - np.arange(6)[:, None]
        seen = (ahead >= -left) & (ahead <= (0 if causal else right))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        expected = jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape)
        attention = Attention("here", causal, window, cap)
        return expected, attention(q, k, v), attention.reference(q, k, v)

    expected, chosen, formula = ways()
    close(chosen, expected)
    close(formula, expected)
    if causal:
        whole, decoded = decode(nn.GroupedQueryAttention(2, **options))
        close(whole, decoded)


@functools.partial(jax.jit, static_argnums=0)
def decode(layer: Any) -> tuple[jax.Array, jax.Array]:
    """All of `X` in one pass, and in three calls."""
    variables = layer.init(quick_key(0), X)
    decoder, cache = layer.clone(decode=True, cache_length=6), {}
    outputs: list[jax.Array] = []
    for tokens in jnp.split(X, [4, 5], axis=1):
        y, cache = decoder.apply({**variables, **cache}, tokens, mutable=["cache"])
        outputs.append(y)
    return layer.apply(variables, X), jnp.concatenate(outputs, axis=1)


FLASH: list[dict[str, Any]] = [
    {"causal": True, "softcap": 2.0},
    {"causal": False, "window": (20, 70)},
]


@pytest.mark.parametrize("options", FLASH)
def test_the_tpu_kernel_step_by_step_equals_the_reference(options: dict[str, Any]) -> None:
    q, k, v = floats(1, 256, 2, 64), floats(1, 256, 1, 64, seed=1), floats(1, 256, 1, 64, seed=2)
    assert why_not_flash(q, k, v) is None
    found = jax.jit(Flash(**options, interpret=True))(q, k, v)
    close(found, jax.jit(Attention("here", **options).reference)(q, k, v), 1e-4)


def gradients(attend: Any) -> Any:
    return jax.grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2))


@functools.cache
def known_gradients() -> tuple[Any, Any]:
    """Queries, keys and values, and what the formula gives."""
    given = floats(1, 128, 4, 64), floats(1, 128, 2, 64, seed=1), floats(1, 128, 2, 64, seed=2)
    return given, jax.jit(gradients(Attention("here").reference))(*given)


def test_gradients_of_the_tpu_kernel() -> None:
    given, expected = known_gradients()
    found = jax.jit(gradients(Flash(True, interpret=True)))(*given)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, expected)


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=4", "data=4,tensor=2"])
def test_on_a_tpu_the_kernel_is_compiled_for_the_part_of_a_device(
    mesh: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowered for a TPU, on any host: the kernel is there, once, in the size of one device."""
    tpu = type("Tpu", (), {"platform": "tpu"})()
    monkeypatch.setattr("shardflax.nn.flash.target_device", lambda: tpu)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, k = jnp.ones((4, 128, 4, 64), jnp.bfloat16), jnp.ones((4, 128, 2, 64), jnp.bfloat16)
    names = ("batch", "length", "act_heads", "act_head_dim")
    attention = Attention("here", query_axes=names)

    def text() -> str:
        return jax.jit(attention).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()

    if mesh is None:
        found, batch = text(), 4
    else:
        with use(make_mesh(mesh), preset("tp_sp")):
            found, batch = text(), 2 if mesh == "data=2,tensor=4" else 1
    assert found.count("stablehlo.custom_call @tpu_custom_call") == 1
    group = 1 if mesh == "data=2,tensor=4" else 2
    kv_heads = 2 if mesh is None else 1
    assert f"tensor<{batch}x{kv_heads}x{group}x128x64xbf16>" in found


def test_a_mesh_of_tpus_chooses_the_kernel_on_any_host() -> None:
    """A topology is compiled for where there is no TPU; what stands in for one says what it is."""
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), auto, abstract_device=tpu)
    q, k = jnp.ones((4, 128, 4, 64), jnp.bfloat16), jnp.ones((4, 128, 2, 64), jnp.bfloat16)
    names = ("batch", "length", "act_heads", "act_head_dim")
    with use(mesh, preset("dp")):
        traced = jax.jit(Attention("here", query_axes=names)).trace(q, k, k)
    assert "pallas_call" in str(traced.jaxpr)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_heads_spread_over_more_devices_than_there_are_groups(implementation: Any) -> None:
    """On explicit axes the keys are whole on each device, and no reshape can split the queries."""
    layer = nn.GroupedQueryAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, implementation=implementation
    )
    x = floats(2, 8, 16)
    variables = jax.jit(layer.init)(quick_key(0), x)
    expected = jax.jit(layer.apply)(variables, x)
    with use(make_mesh("tensor=4", jax.devices()[:4], "explicit"), preset("tp_sp")):
        found = jax.jit(layer.apply)(variables, x)
    close(found, expected, 1e-5)


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_the_kernel_on_a_mesh_gives_the_same(axis_types: Any) -> None:
    """And sends nothing over an axis that no dim of the operands lies on, backward neither."""
    given, expected = known_gradients()
    names = ("batch", "length", "act_heads", "act_head_dim")
    run = functools.partial(nn.flash_attention, query_axes=names, interpret=True)
    mesh = make_mesh("context=2,tensor=4", axis_types=axis_types)
    with use(mesh, preset("tp_sp")):
        compiled = jax.jit(gradients(run)).lower(*given).compile()
    jax.tree.map(lambda a, b: close(a, b, 1e-4), compiled(*given), expected)
    assert not [c for c in collectives(compiled, mesh) if "context" in c.axes]


def test_the_kernel_refuses_a_part_of_the_length() -> None:
    """Each device would attend to its own part alone."""
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)
    names = ("batch", "length", "act_heads", "act_head_dim")
    attention = Attention("here", implementation="flash", query_axes=names)
    with use(make_mesh("data=2,context=4"), preset("cp")):
        for fn in (attention, functools.partial(nn.flash_attention, query_axes=names)):
            with pytest.raises(AttentionOptionsError, match=r"dim 1 .* size 256, .* 'context'"):
                jax.eval_shape(fn, q, q, q)


def test_devices_of_amd_have_no_version_of_cudnn() -> None:
    x = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
    versions = {"8.0": True, "12.1": True, "7.5": False, "gfx942": False}
    found = {v: _cudnn_knows(SimpleNamespace(compute_capability=v), x) for v in versions}
    assert found == versions


CHOSEN: list[tuple[str, Any, int, dict[str, Any], str]] = [
    ("cpu", jnp.float32, 128, {}, "xla"),
    ("cpu", jnp.float16, 128, {}, "reference"),
    ("cpu", jnp.float32, 128, {"softcap": 2.0}, "reference"),
    ("cpu", jnp.float32, 128, {"precision": "highest"}, "reference"),
    ("tpu", jnp.float32, 128, {}, "flash"),
    ("tpu", jnp.bfloat16, 128, {"softcap": 2.0, "window": (3, 3)}, "flash"),
    ("tpu", jnp.bfloat16, 100, {}, "xla"),
    ("tpu", jnp.bfloat16, 128, {"mask": True}, "xla"),
    ("gpu", jnp.bfloat16, 100, {}, "cudnn"),
    ("gpu", jnp.float16, 128, {"window": (3, 3)}, "cudnn"),
    ("gpu", jnp.float32, 128, {}, "xla"),
    ("gpu", jnp.bfloat16, 128, {"mask": True}, "xla"),
    ("gpu", jnp.bfloat16, 128, {"softcap": 2.0}, "reference"),
    ("gpu", jnp.bfloat16, 128, {"dropout": True}, "reference"),
]


@pytest.mark.parametrize(("platform", "dtype", "length", "options", "expected"), CHOSEN)
def test_what_computes_it_follows_backend_and_shapes(
    platform: str, dtype: Any, length: int, options: Any, expected: str, monkeypatch: Any
) -> None:
    device = SimpleNamespace(platform=platform, compute_capability="9.0")
    monkeypatch.setattr("shardflax.nn.flash.target_device", lambda: device)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q: Any = jax.ShapeDtypeStruct((2, length, 4, 64), dtype)
    fields = {k: v for k, v in options.items() if k not in ("mask", "dropout")}
    given = (jnp.ones((1, 1)) if options.get(k) else None for k in ("mask", "dropout"))
    assert Attention("here", **fields).choose(q, q, q, *given) == expected


def test_what_the_kernel_does_not_know_is_said() -> None:
    layer = nn.GroupedQueryAttention(2, implementation="flash")
    with pytest.raises(AttentionOptionsError, match="multiples of 128, found 6 and 6"):
        jax.eval_shape(layer.init, KEY, X)
    with pytest.raises(AttentionOptionsError, match="there is a mask"):
        jax.eval_shape(lambda: layer.init(KEY, X, mask=jnp.ones((6, 6))))
    with pytest.raises(AttentionOptionsError, match="implementation='splash' does not exist"):
        Attention("here", implementation="splash")
    with pytest.raises(AttentionOptionsError, match="window=-1: numbers of tokens are 0 or more"):
        jax.eval_shape(nn.GroupedQueryAttention(2, window=-1).init, KEY, X)


DECODED = nn.GroupedQueryAttention(4, num_kv_heads=2, normalize_qk=True)


@functools.partial(jax.jit, static_argnums=0)
def started(layer: Any) -> tuple[Any, Any]:
    """The variables of a layer, and its output for all of `X`."""
    variables = layer.init(quick_key(0), X)
    return variables, layer.apply(variables, X, mutable=["cache"])[0]


@functools.partial(jax.jit, static_argnums=0)
def step(decoder: Any, variables: Any, tokens: Any) -> tuple[Any, Any]:
    return decoder.apply(variables, tokens, mutable=["cache"])


@pytest.mark.parametrize("chunks", [[6], [3, 3], [4, 1, 1], [1] * 6])
@pytest.mark.parametrize("length", [None, 9])
def test_decoding_in_any_chunks_equals_one_pass(chunks: list[int], length: int | None) -> None:
    variables, expected = started(DECODED)
    decoder = DECODED.clone(decode=True, cache_length=length)
    cache = {} if length else {"cache": started(decoder)[0]["cache"]}
    outputs = []
    for tokens in np.split(np.asarray(X), np.cumsum(chunks)[:-1], axis=1):
        y, cache = step(decoder, {**variables, **cache}, tokens)
        outputs.append(y)
    close(np.concatenate(outputs, axis=1), expected)
    assert cache["cache"]["cache_index"] == 6
    if length is None:
        y, _ = step(decoder, {**variables, **cache}, np.asarray(X)[:, :1])
        assert np.isnan(y).all(), "more tokens than the cache holds must not look like numbers"


def test_linen_s_cache_step_by_step() -> None:
    ours, theirs = (n.MultiHeadAttention(2, decode=True) for n in (nn, flax.linen))
    a, prefilled = started(ours)
    b = jax.jit(theirs.init)(quick_key(0), X)
    for t, tokens in enumerate(np.split(np.asarray(X), X.shape[1], axis=1)):
        y, cache = step(ours, a, tokens)
        z, other = step(theirs, b, tokens)
        a, b = {**a, **cache}, {**b, **other}
        # In whole programs a newer XLA sums in another order here and there.
        jax.tree.map(functools.partial(close, tolerance=1e-6), (y, a), (z, b))
        close(prefilled[:, t : t + 1], y)


def test_self_attention_is_flax_s() -> None:
    ours, theirs = nn.SelfAttention(2), flax.linen.SelfAttention(2)
    variables = jax.jit(ours.init)(quick_key(0), X)

    def weighed(layer: Any) -> Any:
        way = functools.partial(layer.apply, sow_weights=True, mutable=["intermediates"])
        return jax.jit(way)(variables, X)

    with pytest.warns(DeprecationWarning):
        expected = weighed(theirs)
    jax.tree.map(np.testing.assert_array_equal, weighed(ours), expected)


def test_inputs_kv_is_deprecated() -> None:
    layer = nn.MultiHeadAttention(2)
    with pytest.warns(DeprecationWarning, match="inputs_kv"):
        jax.eval_shape(lambda: layer.init(KEY, X, inputs_kv=X))


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = floats(1, 1, 1, 8), floats(1, 1, 1, 8, seed=1)

    @jax.jit
    def score(i: Any, j: Any) -> Any:
        turned = nn.apply_rotary(q, i[None, None]), nn.apply_rotary(k, j[None, None])
        return jnp.sum(turned[0] * turned[1])

    scores = [score(*pair) for pair in np.array([[3, 1], [12, 10], [3, 2]])]
    close(scores[0], scores[1])
    assert abs(scores[0] - scores[2]) > 1e-3


def test_rotary_is_complex_multiplication() -> None:
    x, positions = np.asarray(floats(2, 6, 2, 8)), np.arange(6)
    y = jax.jit(functools.partial(nn.apply_rotary, theta=100.0))(x, positions)
    z = x[..., :4] + 1j * x[..., 4:]
    angles = positions[:, None] * 100.0 ** (-np.arange(4) / 4)
    turned = z * np.exp(1j * angles)[None, :, None]
    close(y, np.concatenate([turned.real, turned.imag], axis=-1))
    narrow = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    assert jax.eval_shape(nn.apply_rotary, narrow, positions).dtype == jnp.bfloat16


def test_masks_are_flax_s() -> None:
    tokens, keys = X[..., 0], floats(2, 5)
    options: list[dict[str, Any]] = [{}, {"extra_batch_dims": 2}, {"dtype": bool}]
    for kwargs in options:
        np.testing.assert_array_equal(
            nn.make_causal_mask(tokens, **kwargs),
            flax.linen.make_causal_mask(tokens, **kwargs),
        )
        np.testing.assert_array_equal(
            nn.make_attention_mask(tokens, keys, jnp.greater, **kwargs),
            flax.linen.make_attention_mask(tokens, keys, jnp.greater, **kwargs),
        )
    assert nn.combine_masks(None, None) is None


def test_dropout_of_everything() -> None:
    """Nothing is left, and no gradient is NaN."""
    layers = [
        kind(2, dropout_rate=1.0, deterministic=False)
        for kind in (nn.GroupedQueryAttention, nn.MultiHeadAttention)
    ]

    def run(x: Any) -> Any:
        return [layer.init_with_output(quick_key(0), x)[0].sum() for layer in layers]

    found = jax.jit(lambda x: (run(x), jax.grad(lambda x: sum(run(x)))(x)))(X)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_with_bias_mask_and_dropout_is_flax_s(broadcast: bool) -> None:
    q, bias = floats(2, 6, 2, 4), floats(2, 2, 6, 6)
    kwargs: dict[str, Any] = {
        "bias": bias,
        "mask": bias > -1,
        "dropout_rng": quick_key(1),
        "dropout_rate": 0.5,
        "broadcast_dropout": broadcast,
    }
    ours, theirs = (
        jax.jit(functools.partial(n.dot_product_attention, **kwargs))(q, q, q)
        for n in (nn, flax.linen)
    )
    np.testing.assert_array_equal(ours, theirs)
