"""The decoder: its shapes, what must not change its numbers, decoding and sampling."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardflax.nn as nn
from shardflax.core.transform_errors import RematPolicyError
from shardflax.models import (
    Decoder,
    DecoderBlock,
    DecoderConfig,
    ModelConfigError,
    SampleError,
    UnknownModelError,
    decoder_config,
    generate,
)
from shardflax.partitioning import abstract_layout, make_mesh, preset

CONFIG = DecoderConfig(
    vocab_size=32, num_layers=2, embed_dim=16, mlp_dim=32, head_dim=4, max_length=8, dtype="float32"
)
KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 32, (2, 8)))


def changed(**options: Any) -> DecoderConfig:
    return dataclasses.replace(CONFIG, **options)


@functools.cache
def params_of(config: DecoderConfig = CONFIG) -> Any:
    return jax.jit(Decoder(config).init)(KEY, TOKENS)["params"]


@functools.cache
def _logits(config: DecoderConfig) -> Any:
    return jax.jit(lambda params, tokens: Decoder(config).apply({"params": params}, tokens))


def logits(tokens: Any = TOKENS, config: DecoderConfig = CONFIG, params: Any = None) -> Any:
    return _logits(config)(params_of() if params is None else params, tokens)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize("tied", [False, True])
def test_shapes(tied: bool) -> None:
    config = changed(tie_embeddings=tied, dtype="bfloat16")
    y, variables = jax.eval_shape(lambda: Decoder(config).init_with_output(KEY, TOKENS))
    params = variables["params"]
    assert (y.shape, y.dtype) == ((2, 8, 32), jnp.float32)
    assert set(params) == {"embed", "final_norm", "layers"} | (set() if tied else {"head"})
    block = params["layers"]
    assert block["attention"]["query"]["kernel"].shape == (2, 16, 4, 4)
    assert block["attention"]["key"]["kernel"].shape == (2, 16, 2, 4)
    assert block["attention"]["out"]["kernel"].shape == (2, 4, 4, 16)
    assert block["mlp"]["down"]["kernel"].shape == (2, 32, 16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def loss_and_gradients(config: DecoderConfig, params: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        y = Decoder(config).apply({"params": params}, TOKENS)
        return jnp.mean(jax.nn.logsumexp(y, axis=-1) - y[..., 3])

    return jax.jit(jax.value_and_grad(loss))(params)


def stacked(params: Any) -> Any:
    """Parameters of unrolled layers as those of scanned ones."""
    layers = [params[f"layers_{i}"] for i in range(CONFIG.num_layers)]
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def unstacked(params: Any) -> Any:
    """Parameters of scanned layers as those of unrolled ones."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(CONFIG.num_layers)
    }


def test_scan_and_remat_change_no_number() -> None:
    value, gradients = loss_and_gradients(CONFIG, params_of())
    close(loss_and_gradients(changed(remat=None), params_of()), (value, gradients))
    unrolled = changed(scan_layers=False, remat="nothing_saveable")
    found, others = loss_and_gradients(unrolled, unstacked(params_of()))
    close((found, stacked(others)), (value, gradients))


def test_the_body_is_traced_once() -> None:
    traced: list[str] = []

    def count(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, DecoderBlock):
            traced.append(context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        variables = jax.eval_shape(Decoder(CONFIG).init, KEY, TOKENS)
        assert traced == ["__call__"]
        jax.eval_shape(Decoder(CONFIG).apply, variables, TOKENS)
    assert traced == ["__call__"] * 2


def test_no_token_sees_a_later_one() -> None:
    y = logits()
    for t in (1, 4, 7):
        other = logits(TOKENS.at[:, t].add(1) % 32)
        np.testing.assert_array_equal(other[:, :t], y[:, :t])
        assert (np.abs(other[:, t] - y[:, t]) > 1e-4).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_decoding_equals_the_full_pass(dtype: str, tolerance: float) -> None:
    config = changed(dtype=dtype)
    model = Decoder(config, decode=True)

    @jax.jit
    def step(params: Any, cache: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params, **cache}, tokens, mutable=["cache"])

    y, cache = step(params_of(), {}, TOKENS[:, :4])
    outputs = [y]
    for t in range(4, 8):
        y, cache = step(params_of(), cache, TOKENS[:, t : t + 1])
        outputs.append(y)
    close(jnp.concatenate(outputs, axis=1), logits(config=config), tolerance)


def test_grouped_heads_equal_full_heads() -> None:
    """Each key/value head, written out for all the query heads that share it."""
    full = jax.tree.map(lambda x: x, params_of())
    for name in ("key", "value"):
        kernel = full["layers"]["attention"][name]["kernel"]
        full["layers"]["attention"][name]["kernel"] = jnp.repeat(kernel, 2, axis=2)
    close(logits(config=changed(num_kv_heads=4), params=full), logits())


def test_greedy_sampling_is_the_most_probable_token_of_the_full_pass() -> None:
    tokens = TOKENS[:, :3]
    found = generate(CONFIG, params_of(), tokens, 5, KEY, temperature=0.0)
    padded = jnp.zeros((2, 8), jnp.int32).at[:, :3].set(tokens)
    for t in range(3, 8):  # what stands after t does not matter
        padded = padded.at[:, t].set(jnp.argmax(logits(padded)[:, t - 1], axis=-1))
    np.testing.assert_array_equal(found, padded[:, 3:])
    assert found.dtype == jnp.int32
    close(found, generate(CONFIG, params_of(), tokens, 5, KEY, temperature=1.0, top_k=1))


def test_top_k_and_temperature() -> None:
    """Of many rows, all within the most probable tokens; hotter ones are spread wider."""
    prompt = jnp.tile(TOKENS[:1, :3], (256, 1))
    best = np.argsort(logits(jnp.pad(prompt[:1], ((0, 0), (0, 5))))[0, 2])[::-1]

    def drawn(**options: Any) -> Any:
        return np.asarray(generate(CONFIG, params_of(), prompt, 1, KEY, **options))[:, 0]

    top = drawn(top_k=4)
    assert set(top) <= set(best[:4].tolist()) and len(set(top)) > 1
    cold, hot = drawn(temperature=0.1), drawn(temperature=10.0)
    assert len(set(cold)) < len(set(hot))
    assert not (
        drawn() == np.asarray(generate(CONFIG, params_of(), prompt, 1, jax.random.key(1)))[:, 0]
    ).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads=4 does not divide num_heads=6"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"num_layers": 0}, "num_layers=0 is no positive number"),
        ({"num_layers": "8"}, "num_layers='8' is no positive number"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 is not positive"),
        ({"dtype": "int32"}, "dtype='int32' is no floating dtype"),
        ({"param_dtype": "float23"}, "param_dtype='float23' is no floating dtype"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelConfigError, match=text):
        changed(**options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": TOKENS[0]}, r"shape \(8,\), expected \(batch, tokens\)"),
        ({"prompt": TOKENS[:, :0]}, r"shape \(2, 0\)"),
        ({"length": 0}, "length=0, expected a number from 1"),
        ({"length": 2.5}, "length=2.5"),
        ({"prompt": TOKENS[:, :2] + 32}, r"the id \d+, expected ids from 0 to 31"),
        ({"prompt": [[1, -1]]}, "the id -1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_k": 0}, r"top_k=0, expected None, or a number from 1 to 32 \(vocab_size\)"),
    ],
)
def test_samples_that_cannot_be(change: dict[str, Any], text: str) -> None:
    given = {"prompt": TOKENS[:, :2], "length": 1, **change}
    with pytest.raises(SampleError, match=text):
        generate(CONFIG, None, key=KEY, **given)


def test_errors_by_name() -> None:
    with pytest.raises(RematPolicyError, match="did you mean 'dots_saveable'"):
        decoder_config("tiny", remat="dots_savable")
    with pytest.raises(UnknownModelError, match="did you mean 'tiny'"):
        decoder_config("tinny")
    with pytest.raises(ModelConfigError, match="did you mean 'num_layers'"):
        decoder_config("tiny", num_layer=3)
    with pytest.raises(ModelConfigError, match=r"max_length=8 tokens, for 8 \+ 1"):
        generate(CONFIG, params_of(), TOKENS, 1, KEY)


def test_llama3_8b_has_its_size() -> None:
    model = Decoder(decoder_config("llama3-8b"))
    params = jax.eval_shape(model.init, KEY, jnp.ones((1, 8), jnp.int32))["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert count == 8_030_261_248
    y = jax.eval_shape(model.apply, {"params": params}, jnp.ones((2, 16), jnp.int32))
    assert y.shape == (2, 16, 128_256)


def test_llama3_8b_has_a_layout() -> None:
    """On devices that nobody has: a layout needs shapes alone."""
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    model = Decoder(decoder_config("llama3-8b"))
    layout = abstract_layout(
        lambda key: {"params": model.init(key, jnp.ones((8, 8), jnp.int32))["params"]},
        KEY,
        mesh=mesh,
        rules=preset("fsdp_tp"),
    )
    assert layout.problems == ()
    assert layout.leaf("params/layers/mlp/down/kernel").spec == jax.P(None, "tensor", "fsdp")
    assert layout.bytes_per_device < 8.04e9  # of 4 bytes each over 4 of 8 devices, norms whole


def test_without_rules_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(Decoder(CONFIG).init, KEY, TOKENS)
        jax.eval_shape(nn.remat(Decoder)(CONFIG).init, KEY, TOKENS)
