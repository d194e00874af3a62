"""Wrong input is answered with the module, the dim and both sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardflax.nn as nn
from shardflax.core.errors import FlaxError

KEY = jax.random.key(0)
NOTHING: Any = None
X = jnp.ones((2, 3, 8))


class Model(nn.Module):
    """Calls a layer of the name `inner`, so that errors have a path to name."""

    make: Callable[..., Any]

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(name="inner")(*args, **kwargs)


def run(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return lambda: jax.eval_shape(lambda: Model(make).init(KEY, *args, **kwargs))


def heads(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.GroupedQueryAttention(**kwargs, **k)


def mha(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.MultiHeadAttention(**kwargs, **k)


def general(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.DenseGeneral(**kwargs, **k)


def conv(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.Conv(*args, **kwargs, **k)


def cell(kind: Any, *args: Any) -> Callable[..., Any]:
    return lambda **k: kind(3, *args, **k)


def embed(**kwargs: Any) -> Callable[..., Any]:
    return lambda **k: nn.Embed(5, 3, **kwargs, **k)


def einsum(*args: Any) -> Callable[..., Any]:
    return lambda **k: nn.Einsum(*args, **k)


def by_fan_in(key: Any, shape: Any, dtype: Any) -> jax.Array:
    """An initializer that knows no empty inputs, as JAX's did not for long."""
    return jnp.full(shape, 1 // shape[0], dtype)


CASES: list[tuple[Any, str]] = [
    (run(lambda **k: nn.Dense(3, **k), 1.0), r"Dense 'inner': inputs have shape \(\) \(0 dims\)"),
    (run(lambda **k: nn.Dense(NOTHING, **k), X), "Dense 'inner': features=None, expected a whole"),
    (run(general(features=(2, -1)), X), "General 'inner': features=-1, expected a whole"),
    (run(conv(2.0, 3), X), "Conv 'inner': features=2.0, expected a whole"),
    (run(lambda **k: nn.ConvTranspose(NOTHING, 3, **k), X), "Transpose 'inner': features=None"),
    (run(lambda **k: nn.Embed(-1, 3, **k), X), "Embed 'inner': num_embeddings=-1"),
    (run(einsum((8, None), "...a,ab->...b"), X), "Einsum 'inner': shape=None, expected"),
    (run(lambda **k: nn.RNN(nn.GRUCell(-1), **k), X), "GRUCell '.*': features=-1"),
    (run(lambda **k: nn.RNN(nn.ConvLSTMCell(NOTHING, (3,)), **k), X[None]), "features=None"),
    (run(mha(num_heads=None), X), "MultiHeadAttention 'inner': num_heads=None, expected"),
    (run(heads(num_heads=2, head_dim=-2), X), "Attention 'inner': head_dim=-2, expected"),
    (
        run(lambda **k: nn.Dense(3, kernel_init=by_fan_in, **k), X[..., :0]),
        r"Dense 'inner': parameter 'kernel' has shape \(0, 3\), .* the size of dim 0, 0",
    ),
    (run(general(features=3, axis=7), X), r"axis=\(7,\) .* \(2, 3, 8\): dim 7 does not exist"),
    (run(general(features=3, axis=(2, -1)), X), "a dim is given twice"),
    (run(general(features=3, batch_dims=(1,)), X), "must be the leading dims"),
    (run(general(features=3, axis=0, batch_dims=(0,)), X), "dim 0 is also one of batch_dims"),
    (run(einsum((8, 3)), X), "passed nowhere"),
    (run(einsum((8, 3), "...a,ab->...b"), X, "...a,ab->...b"), "to the layer and to the call"),
    (run(einsum((8, 3), "...a,ab"), X), "must say its output"),
    (run(einsum((8, 3), "...a->...a"), X), "two operands"),
    (run(einsum((8, 3, 2), "...a,ab->...b"), X), "a kernel of 2 dims, shape has 3"),
    (run(einsum((8, 3), "ab,bc->ac"), X), r"\(2, 3, 8\) \(3 dims\), expected those of 'ab'"),
    (run(einsum((8, 3), "...a,ab->...b->b"), X), "must say its output, once"),
    (run(einsum((8, 3), "...a,ab->...c"), X), "'c' of the output is in no operand"),
    (run(einsum((8, 3), "..a,ab->..b"), X), "dots that are not one"),
    (
        run(einsum((8,), "...a,a->..."), X),
        r"'inner': parameter 'kernel' of shape \(8,\): Can't comp",
    ),
    (run(conv(6, 3, padding="CIRCULAR"), X[:, :0]), "Conv 'inner': padding='CIRCULAR'.* dim -2"),
    (run(conv(6, 3, padding=None), X), "Conv 'inner': padding=None: Write one of"),
    (run(lambda **k: nn.Embed(5, 3, **k), X), "Embed 'inner': inputs have dtype float32"),
    (run(embed(lookup="onehot"), X[..., 0].astype(int)), "did you mean 'one_hot'"),
    (run(lambda **k: nn.Dropout(1.5, **k), X, deterministic=True), "rate=1.5"),
    (run(mha(num_heads=2, dropout_rate=1.5), X, deterministic=True), "rate=1.5"),
    (run(heads(num_heads=2, dropout_rate=-0.5), X, deterministic=True), "rate=-0.5"),
    (
        run(heads(num_heads=2, implementation="cudnn", logit_softcap=2.0), X),
        "implementation='cudnn' cannot be used: there is logit_softcap=2.0",
    ),
    (run(lambda **k: nn.Dropout(0.5, **k), X), "'deterministic' was given neither"),
    (run(lambda **k: nn.Sequential([], **k), X), "Sequential 'inner': `layers` is empty"),
    (run(lambda **k: nn.LayerNorm(**k), X, mask=jnp.ones((2, 4, 8))), "dim -2: 4 against 3"),
    (run(lambda **k: nn.LayerNorm(feature_axes=3, **k), X), "dim 3 does not exist"),
    (run(heads(num_heads=6, num_kv_heads=4, head_dim=2), X), "num_heads=6 .* num_kv_heads=4"),
    (run(heads(num_heads=3), X), "'inner': features=8 is not a multiple of num_heads=3"),
    (run(heads(num_heads=8), X), "head_dim=1 is odd"),
    (run(heads(num_heads=2), X[0, 0]), r"expected \(batch, length, features\)"),
    (run(heads(num_heads=2), X, mask=jnp.ones((2, 1, 3, 5))), "dim -1: 5 against 3"),
    (run(heads(num_heads=2), X, positions=jnp.ones((2, 5))), r"positions of shape \(2, 5\)"),
    (run(mha(num_heads=3), X), "qkv_features=8 is not a multiple of num_heads=3"),
    (run(mha(num_heads=2), X, mask=jnp.ones((2, 1, 5, 3))), "dim -2: 5 against 3"),
    (run(mha(num_heads=2), X, None, X), "`inputs_v` without `inputs_k`"),
    (run(mha(num_heads=2), X, jnp.ones((4, 3, 8))), "batch dims must agree"),
    (run(mha(num_heads=2), X, jnp.ones((2, 5, 8)), X), r"lengths \(dim -3\) must agree"),
    (run(lambda **k: nn.Dropout(0.5, (3,), False, **k), X), r"\(2, 3, 8\): dim 3 does not exist"),
    (run(lambda **k: nn.GroupNorm(3, **k), X), "Norm 'inner': .*8.*3"),
    (run(lambda **k: nn.InstanceNorm(feature_axes=5, **k), X), "Norm 'inner': .*dim 5"),
    (run(lambda **k: nn.RMSNorm(reduction_axes=3, **k), X), "RMSNorm 'inner': .*dim 3"),
    (run(lambda **k: nn.BatchNorm(False, axis=4, **k), X), "BatchNorm 'inner': .*dim 4"),
    (
        run(lambda **k: nn.BatchNorm(False, **k), X, mask=jnp.ones((2, 5, 1))),
        "BatchNorm 'inner': .*dim -2: 5 against 3",
    ),
    (run(conv(6, (3, 3)), X[0]), r"Conv 'inner': inputs have shape \(3, 8\)"),
    (run(conv(6, 3, feature_group_count=3), X), "Conv 'inner': .*8.*3"),
    (run(conv(6, 3, mask=jnp.ones((3, 8, 5))), X), "Conv 'inner': .*5.*6"),
    (run(conv(6, (3,), strides=(1, 2)), X), "Conv 'inner': strides=.* 2 entries"),
    (run(lambda **k: nn.ConvLocal(6, 3, feature_group_count=2, **k), X), "only 1 is possible"),
    (run(lambda **k: nn.ConvTranspose(6, (3, 3), **k), X[0]), "ConvTranspose 'inner': .*2 dims"),
    *(
        (
            run(cell(kind), jnp.ones((2, 4)), X[:, 0]),
            rf"{kind.__name__} 'inner': the carry has shape \(2, 4\), expected \(2, 3\)",
        )
        for kind in (nn.SimpleCell, nn.GRUCell, nn.MGUCell)
    ),
    *(
        (
            run(cell(kind), (jnp.ones((2, 3)), jnp.ones((5, 3))), X[:, 0]),
            r"Cell 'inner': .*has shape \(5, 3\), expected \(2, 3\)",
        )
        for kind in (nn.LSTMCell, nn.OptimizedLSTMCell)
    ),
    (
        run(cell(nn.ConvLSTMCell, (3,)), (jnp.ones((2, 5, 3)), jnp.ones((2, 3, 3))), X),
        r"ConvLSTMCell 'inner': `c` of the carry has shape \(2, 5, 3\), expected \(2, 3, 3\)",
    ),
    (
        run(lambda **k: nn.RNN(nn.GRUCell(3), **k), X, seq_lengths=jnp.ones((3,), int)),
        r"RNN 'inner': `seq_lengths` has shape \(3,\), .* \(2,\)",
    ),
    (run(lambda **k: nn.RNN(nn.GRUCell(3), **k), X[0, 0]), "RNN 'inner': inputs .*1 dims"),
    (
        run(
            lambda **k: nn.SpectralNorm(nn.Conv(3, 3), error_on_non_matrix=True, **k),
            X,
            update_stats=False,
        ),
        "SpectralNorm 'inner': .*a matrix",
    ),
    (
        run(lambda **k: nn.WeightNorm(nn.Dense(3), feature_axes=2, **k), X),
        "WeightNorm 'inner': feature_axes.*dim 2",
    ),
    (
        run(heads(num_heads=1, head_dim=64, implementation="flash"), X),
        "'inner': implementation='flash' .* lengths must be multiples of 128, found 3",
    ),
]


MASKS: list[tuple[Any, str]] = [
    (lambda: nn.make_attention_mask(X[0, 0], X[0, 0, 0]), r"key_input have shape \(\)"),
    (lambda: nn.make_attention_mask(X[:, 0], X[0]), r"batch dims .* \(2, 8\), .* \(3, 8\)"),
    (lambda: nn.make_causal_mask(X[0, 0, 0]), r"make_causal_mask: x have shape \(\)"),
    (
        run(lambda **k: nn.ConvTranspose(3, 3, 2, "SAME_LOWER", **k), X),
        "Transpose 'inner': padding='SAME_LOWER'.* 'CIRCULAR'",
    ),
]


@pytest.mark.parametrize(("fails", "message"), [*CASES, *MASKS])
def test_message(fails: Callable[[], Any], message: str) -> None:
    with pytest.raises(FlaxError, match=message) as caught:
        fails()
    assert isinstance(caught.value, ValueError)


def test_sequential_of_no_sequence() -> None:
    with pytest.raises(FlaxError, match="must be a sequence, found Dense"):
        nn.Sequential(nn.Dense(3))  # pyright: ignore[reportArgumentType]


def test_attend_of_another_width() -> None:
    table = nn.Embed(5, 3)
    variables = {"params": {"embedding": jnp.ones((5, 3))}}
    with pytest.raises(FlaxError, match=r"dim -1 of query has size 4, expected 3"):
        table.apply(variables, jnp.ones((2, 4)), method="attend")


def given(layer: nn.Module, variables: Any, x: Any) -> Callable[[], Any]:
    """Applies a layer to variables and inputs of which shapes are known."""
    return lambda: jax.eval_shape(lambda *a: layer.apply(*a, mutable=["cache"]), variables, x)


def test_more_tokens_than_the_cache_holds() -> None:
    layer = nn.GroupedQueryAttention(num_heads=2, cache_length=4, decode=True)
    params = {"params": jax.eval_shape(layer.init, KEY, X)["params"]}
    with pytest.raises(FlaxError, match="5 tokens at once into a cache of length 4"):
        given(layer, params, jnp.ones((2, 5, 8)))()
    with pytest.raises(FlaxError, match="set `cache_length`"):
        given(layer.clone(cache_length=None), params, X)()


def test_another_batch_than_the_cache_has() -> None:
    layer = nn.MultiHeadAttention(num_heads=2, decode=True)
    variables = jax.eval_shape(layer.init, KEY, X)
    with pytest.raises(FlaxError, match=r"has shape \(3, 1, 2, 4\), the cached one \(2, 3, 2, 4\)"):
        given(layer, variables, jnp.ones((3, 1, 8)))()


def test_an_attention_function_that_would_drop_what_is_asked_for() -> None:
    layer = nn.MultiHeadAttention(num_heads=2, attention_fn=lambda query, key, value: value)
    assert jax.eval_shape(layer.init_with_output, KEY, X)[0].shape == X.shape
    with pytest.raises(FlaxError, match="has no argument `mask`"):
        jax.eval_shape(lambda: layer.init(KEY, X, mask=jnp.ones((1, 1, 3, 3))))
    with pytest.raises(FlaxError, match=r"`sow_weights` is on, .* has no argument `module`"):
        jax.eval_shape(lambda: layer.init(KEY, X, sow_weights=True))
    layer = layer.clone(dropout_rate=0.5)
    with pytest.raises(FlaxError, match=r"there is dropout, .* has no argument `dropout_rate`"):
        jax.eval_shape(lambda: layer.init(KEY, X, deterministic=False))
