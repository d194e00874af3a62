"""The namespace of models: modules, transforms, layers, activations, initializers and names.

It holds what `flax.linen` holds, under the same names; what is not there yet is missing, not
different.

>>> import jax, jax.numpy as jnp
>>> import shardflax.nn as nn
>>> class MLP(nn.Module):
...     width: int
...
...     @nn.compact
...     def __call__(self, x):
...         x = nn.relu(nn.Dense(self.width)(x))
...         return nn.Dense(1)(x)
>>> model = MLP(width=8)
>>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
>>> model.apply(variables, jnp.ones((2, 3))).shape
(2, 1)
"""

from shardflax.core import (
    AxisMetadata,
    CollectionFilter,
    DenyList,
    In,
    Module,
    Out,
    Variable,
    add_metadata_axis,
    broadcast,
    checkpoint,
    compact,
    cond,
    custom_vjp,
    fold_rngs,
    grad,
    intercept_methods,
    jit,
    jvp,
    lifted,
    map_variables,
    named_call,
    nowrap,
    remat,
    remat_scan,
    scan,
    switch,
    unbox,
    value_and_grad,
    vjp,
    vmap,
    while_loop,
)
from shardflax.core.run import apply, init, init_with_output
from shardflax.nn import dtypes, initializers, meta, transforms
from shardflax.nn.activations import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    logsumexp,
    normalize,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    standardize,
    swish,
    tanh,
)
from shardflax.nn.attention import MultiHeadAttention, MultiHeadDotProductAttention, SelfAttention
from shardflax.nn.containers import Sequential
from shardflax.nn.dot_product import dot_product_attention, dot_product_attention_weights
from shardflax.nn.einsum import Einsum
from shardflax.nn.embed import Embed
from shardflax.nn.general import DenseGeneral
from shardflax.nn.grouped import GroupedQueryAttention
from shardflax.nn.initializers import ones, ones_init, zeros, zeros_init
from shardflax.nn.linear import Dense
from shardflax.nn.masks import combine_masks, make_attention_mask, make_causal_mask
from shardflax.nn.normalization import LayerNorm, RMSNorm
from shardflax.nn.rotary import apply_rotary, rotary_angles
from shardflax.nn.stochastic import Dropout, merge_param
from shardflax.partitioning import (
    PARTITION_NAME,
    LogicallyPartitioned,
    Partitioned,
    RulesFallback,
    get_logical_axis_rules,
    get_partition_spec,
    get_sharding,
    logical_axis_rules,
    logical_to_mesh,
    logical_to_mesh_axes,
    logical_to_mesh_sharding,
    set_logical_axis_rules,
    with_logical_constraint,
    with_logical_partitioning,
    with_partitioning,
)

__all__ = [
    "PARTITION_NAME",
    "AxisMetadata",
    "CollectionFilter",
    "Dense",
    "DenseGeneral",
    "DenyList",
    "Dropout",
    "Einsum",
    "Embed",
    "GroupedQueryAttention",
    "In",
    "LayerNorm",
    "LogicallyPartitioned",
    "Module",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "Out",
    "Partitioned",
    "RMSNorm",
    "RulesFallback",
    "SelfAttention",
    "Sequential",
    "Variable",
    "add_metadata_axis",
    "apply",
    "apply_rotary",
    "broadcast",
    "celu",
    "checkpoint",
    "combine_masks",
    "compact",
    "cond",
    "custom_vjp",
    "dot_product_attention",
    "dot_product_attention_weights",
    "dtypes",
    "elu",
    "fold_rngs",
    "gelu",
    "get_logical_axis_rules",
    "get_partition_spec",
    "get_sharding",
    "glu",
    "grad",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "init",
    "init_with_output",
    "initializers",
    "intercept_methods",
    "jit",
    "jvp",
    "leaky_relu",
    "lifted",
    "log_sigmoid",
    "log_softmax",
    "logical_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_axes",
    "logical_to_mesh_sharding",
    "logsumexp",
    "make_attention_mask",
    "make_causal_mask",
    "map_variables",
    "merge_param",
    "meta",
    "named_call",
    "normalize",
    "nowrap",
    "one_hot",
    "ones",
    "ones_init",
    "relu",
    "relu6",
    "remat",
    "remat_scan",
    "rotary_angles",
    "scan",
    "selu",
    "set_logical_axis_rules",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "standardize",
    "swish",
    "switch",
    "tanh",
    "transforms",
    "unbox",
    "value_and_grad",
    "vjp",
    "vmap",
    "while_loop",
    "with_logical_constraint",
    "with_logical_partitioning",
    "with_partitioning",
    "zeros",
    "zeros_init",
]
