"""Cross-entropy against a plain float64 computation, and sharded over the vocabulary."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardflax.partitioning import batch_sharding, collectives, make_mesh, preset, use
from shardflax.training.errors import LossInputError
from shardflax.training.losses import cross_entropy, next_tokens


def reference(logits: Any, targets: Any, weights: Any, z_loss: float) -> tuple[Any, Any]:
    """Loss and gradient by the textbook, in float64."""
    logits, weights = np.asarray(logits, np.float64), np.asarray(weights, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)
    right = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    share = weights / weights.sum()
    loss = (share * (log_z - right + z_loss * log_z**2)).sum()
    softmax = np.exp(logits - log_z[..., None])
    grad = softmax * (1 + 2 * z_loss * log_z)[..., None] - np.eye(logits.shape[-1])[targets]
    return loss, share[..., None] * grad


def example(scale: float = 3.0) -> tuple[Any, Any, Any]:
    """Logits (4, 6, 32), targets, and weights of which some are zero."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 6, 32), scale=scale).astype(np.float32)
    return (
        logits,
        rng.integers(32, size=(4, 6)).astype(np.int32),
        rng.integers(3, size=(4, 6)).astype(np.float32),
    )


@functools.partial(jax.jit, static_argnames="z_loss")
def value_and_gradient(logits: Any, targets: Any, weights: Any = None, z_loss: float = 0.0) -> Any:
    return jax.value_and_grad(
        lambda x: cross_entropy(x, targets, weights=weights, z_loss=z_loss)[0]
    )(logits)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_value_and_gradient_against_float64(scale: float, weighted: bool, z_loss: float) -> None:
    logits, targets, weights = example(scale)
    loss, grad = value_and_gradient(logits, targets, weights if weighted else None, z_loss)
    want = reference(logits, targets, weights if weighted else np.ones((4, 6)), z_loss)
    np.testing.assert_allclose(loss, want[0], rtol=2e-6)
    np.testing.assert_allclose(grad, want[1], rtol=1e-4, atol=2e-7)


def test_metrics() -> None:
    logits, targets, weights = example()
    loss, metrics = jax.jit(functools.partial(cross_entropy, z_loss=1e-2))(
        logits, targets, weights=weights
    )
    hits = (logits.argmax(-1) == targets) * weights
    assert set(metrics) == {"cross_entropy", "z_loss", "accuracy", "weight"}
    np.testing.assert_allclose(metrics["accuracy"], hits.sum() / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"] + metrics["z_loss"], loss, rtol=1e-6)
    assert metrics["weight"] == weights.sum()
    assert all(m.dtype == jnp.float32 and m.shape == () for m in (loss, *metrics.values()))


def test_bf16_logits_are_summed_in_f32() -> None:
    logits, targets, _ = example()
    half = logits.astype(jnp.bfloat16)
    loss, grad = value_and_gradient(half, targets)
    want, _ = reference(np.asarray(half, np.float32), targets, np.ones((4, 6)), 0.0)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert grad.dtype == jnp.bfloat16


def test_masked_vocabulary_and_ignored_targets() -> None:
    logits, targets, _ = example()
    padded = np.concatenate([logits, np.full((4, 6, 8), -np.inf, np.float32)], -1)
    plain, _ = value_and_gradient(logits, targets)
    loss, grad = value_and_gradient(padded, targets)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    assert np.isfinite(grad).all() and not np.asarray(grad)[..., 32:].any()

    marked, weights = targets.copy(), np.ones((4, 6), np.float32)
    marked[0], weights[0] = -100, 0.0
    weighed = jax.jit(cross_entropy)
    got, metrics = weighed(logits, marked, weights=weights)
    want, _ = reference(logits[1:], targets[1:], np.ones((3, 6)), 0.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isfinite(metrics["accuracy"])
    for outside in (-1, 32):
        wrong = targets.copy()
        wrong[0, 0] = outside
        assert np.isnan(weighed(logits, wrong, weights=np.ones((4, 6), np.float32))[0])


def test_targets_in_eight_bits_of_a_larger_vocabulary() -> None:
    """Numbers up to 255 do not hold the ids that they are compared with."""
    logits = jnp.arange(300.0)[None]
    ids: list[Any] = [np.array([3], dtype) for dtype in ("uint8", "int64")]
    found = [cross_entropy(logits, each)[0] for each in ids]
    assert found[0] == found[1] > 290


def test_no_weight_at_all_is_no_loss() -> None:
    logits, targets, _ = example()
    loss, grad = value_and_gradient(logits, targets, np.zeros((4, 6), np.float32))
    assert loss == 0 and not np.asarray(grad).any()


@pytest.mark.parametrize("axes", [("data", "tensor"), ("data", None)], ids=str)
def test_a_sharded_vocabulary_is_not_gathered(axes: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits, targets, weights = example()
    spread = NamedSharding(mesh, PartitionSpec(axes[0], None, axes[1]))
    rows = NamedSharding(mesh, PartitionSpec(axes[0]))
    args = (
        jax.device_put(logits, spread),
        jax.device_put(targets, rows),
        jax.device_put(weights, rows),
    )

    def f(x: Any, t: Any, w: Any) -> Any:
        return jax.value_and_grad(
            lambda x: cross_entropy(x, t, weights=w, z_loss=1e-2), has_aux=True
        )(x)

    compiled = jax.jit(f, out_shardings=(None, spread)).lower(*args).compile()
    hlo = str(compiled.as_text())
    assert not re.search(r"all-gather|all-to-all|collective-permute", hlo)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
        for line in hlo.splitlines()
        if "all-reduce(" in line
        for dims in re.findall(r"f32\[([\d,]*)\]", line.split("all-reduce(")[0])
    ]
    assert sizes and max(sizes) <= 2 * 6  # (rows of a device, length): never a vocab dim
    (loss, _), grad = compiled(*args)
    want = reference(logits, targets, weights, 1e-2)
    np.testing.assert_allclose(loss, want[0], rtol=2e-6)
    np.testing.assert_allclose(grad, want[1], rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"targets": jnp.zeros((4, 5), jnp.int32)}, "targets"),
        ({"targets": jnp.zeros((4, 6))}, "targets"),
        ({"logits": jnp.zeros((4, 6, 32), jnp.int32)}, "logits"),
        ({"weights": jnp.ones((4, 1))}, "weights"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Any, argument: str) -> None:
    given = {
        "logits": jnp.zeros((4, 6, 32)),
        "targets": jnp.zeros((4, 6), jnp.int32),
        "weights": None,
    } | change
    with pytest.raises(LossInputError, match="expected") as caught:
        cross_entropy(**given)
    assert caught.value.argument == argument


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_targets_of_a_length_that_is_spread(types: Any) -> None:
    """One token of each row goes to the neighbour; nothing is gathered, and no length is odd."""
    mesh, rules = make_mesh("data=2,context=4", axis_types=types), preset("cp")
    tokens = np.random.default_rng(0).integers(1, 50, size=(4, 8)).astype(np.int32)
    with use(mesh, rules):
        placed = jax.device_put(tokens, batch_sharding(mesh, rules, shape=tokens.shape))
        compiled = jax.jit(next_tokens).lower(placed).compile()
        targets, weights = compiled(placed)
    np.testing.assert_array_equal(np.asarray(targets), np.c_[tokens[:, 1:], [0] * 4])
    np.testing.assert_array_equal(weights, [[1.0] * 7 + [0.0]] * 4)
    assert targets.sharding.spec == placed.sharding.spec
    sent = [(one.what, one.bytes) for one in collectives(compiled)]
    assert sent == [("collective-permute over context", 2 * 4)]


def test_a_single_number_is_no_text() -> None:
    with pytest.raises(LossInputError, match=r"next_tokens: tokens have no dims"):
        next_tokens(jnp.int32(3))
