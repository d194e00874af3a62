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

from typing import TYPE_CHECKING

from shardflax.core import (
    AxisMetadata,
    CollectionFilter,
    DenyList,
    FrozenDict,
    In,
    Module,
    Out,
    Variable,
    add_metadata_axis,
    broadcast,
    checkpoint,
    compact,
    compact_name_scope,
    cond,
    custom_vjp,
    disable_named_call,
    enable_named_call,
    fold_rngs,
    grad,
    intercept_methods,
    jit,
    jvp,
    lifted,
    named_call,
    nowrap,
    override_named_call,
    remat,
    remat_scan,
    scan,
    share_scope,
    switch,
    tabulate,
    unbox,
    value_and_grad,
    vjp,
    vmap,
    while_loop,
)
from shardflax.core.lazy import lazily
from shardflax.core.run import apply, init, init_with_output

# Layers, activations and what else takes time to import are imported when they are first used.
# Type checkers read the imports, Python the table: tests/nn/test_namespace.py holds them together.
if TYPE_CHECKING:
    from shardflax.nn import (
        activation,
        dtypes,
        fp8_ops,
        initializers,
        meta,
        module,
        recurrent,
        spmd,
        summary,
        transforms,
    )
    from shardflax.nn.activation import (
        PReLU,
        celu,
        elu,
        gelu,
        glu,
        hard_sigmoid,
        hard_silu,
        hard_swish,
        hard_tanh,
        identity,
        leaky_relu,
        log_sigmoid,
        log_softmax,
        logsumexp,
        mish,
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
        squareplus,
        standardize,
        swish,
        tanh,
    )
    from shardflax.nn.attention import (
        MultiHeadAttention,
        MultiHeadDotProductAttention,
        SelfAttention,
    )
    from shardflax.nn.batch_apply import BatchApply
    from shardflax.nn.combinators import Sequential
    from shardflax.nn.conv import Conv, ConvLocal
    from shardflax.nn.conv_transpose import ConvTranspose
    from shardflax.nn.dot_product import dot_product_attention, dot_product_attention_weights
    from shardflax.nn.einsum import Einsum
    from shardflax.nn.embed import Embed
    from shardflax.nn.flash import flash_attention
    from shardflax.nn.fp8_ops import (
        Fp8DirectDotGeneralOp,
        Fp8DotGeneral,
        Fp8DotGeneralBase,
        Fp8DotGeneralOp,
        Fp8Einsum,
        NANOOFp8DotGeneralOp,
    )
    from shardflax.nn.general import DenseGeneral
    from shardflax.nn.grouped import GroupedQueryAttention
    from shardflax.nn.initializers import ones, ones_init, zeros, zeros_init
    from shardflax.nn.linear import Dense
    from shardflax.nn.masks import combine_masks, make_attention_mask, make_causal_mask
    from shardflax.nn.normalization import (
        BatchNorm,
        GroupNorm,
        InstanceNorm,
        LayerNorm,
        RMSNorm,
        SpectralNorm,
        WeightNorm,
    )
    from shardflax.nn.policy import Policy
    from shardflax.nn.pooling import avg_pool, max_pool, min_pool, pool
    from shardflax.nn.recurrent import (
        RNN,
        Bidirectional,
        ConvLSTMCell,
        GRUCell,
        LSTMCell,
        MGUCell,
        OptimizedLSTMCell,
        RNNCellBase,
        SimpleCell,
    )
    from shardflax.nn.rotary import apply_rotary, rotary_angles
    from shardflax.nn.stochastic import Dropout, merge_param
    from shardflax.nn.transforms import map_variables
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
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "shardflax.nn.activation": """
                PReLU celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity
                leaky_relu log_sigmoid log_softmax logsumexp mish normalize one_hot relu relu6
                selu sigmoid silu soft_sign softmax softplus squareplus standardize swish tanh
            """,
            "shardflax.nn.attention": """
                MultiHeadAttention MultiHeadDotProductAttention SelfAttention
            """,
            "shardflax.nn.batch_apply": "BatchApply",
            "shardflax.nn.combinators": "Sequential",
            "shardflax.nn.conv": "Conv ConvLocal",
            "shardflax.nn.conv_transpose": "ConvTranspose",
            "shardflax.nn.dot_product": "dot_product_attention dot_product_attention_weights",
            "shardflax.nn.einsum": "Einsum",
            "shardflax.nn.embed": "Embed",
            "shardflax.nn.flash": "flash_attention",
            "shardflax.nn.fp8_ops": """
                Fp8DirectDotGeneralOp Fp8DotGeneral Fp8DotGeneralBase Fp8DotGeneralOp Fp8Einsum
                NANOOFp8DotGeneralOp
            """,
            "shardflax.nn.general": "DenseGeneral",
            "shardflax.nn.grouped": "GroupedQueryAttention",
            "shardflax.nn.initializers": "ones ones_init zeros zeros_init",
            "shardflax.nn.linear": "Dense",
            "shardflax.nn.masks": "combine_masks make_attention_mask make_causal_mask",
            "shardflax.nn.normalization": """
                BatchNorm GroupNorm InstanceNorm LayerNorm RMSNorm SpectralNorm WeightNorm
            """,
            "shardflax.nn.policy": "Policy",
            "shardflax.nn.pooling": "avg_pool max_pool min_pool pool",
            "shardflax.nn.recurrent": """
                RNN Bidirectional ConvLSTMCell GRUCell LSTMCell MGUCell OptimizedLSTMCell
                RNNCellBase SimpleCell
            """,
            "shardflax.nn.rotary": "apply_rotary rotary_angles",
            "shardflax.nn.stochastic": "Dropout merge_param",
            "shardflax.nn.transforms": "map_variables",
            "shardflax.partitioning": """
                PARTITION_NAME LogicallyPartitioned Partitioned RulesFallback
                get_logical_axis_rules get_partition_spec get_sharding logical_axis_rules
                logical_to_mesh logical_to_mesh_axes logical_to_mesh_sharding
                set_logical_axis_rules with_logical_constraint with_logical_partitioning
                with_partitioning
            """,
        },
        modules={
            "activation": "shardflax.nn.activation",
            "dtypes": "shardflax.nn.dtypes",
            "fp8_ops": "shardflax.nn.fp8_ops",
            "initializers": "shardflax.nn.initializers",
            "meta": "shardflax.nn.meta",
            "module": "shardflax.nn.module",
            "recurrent": "shardflax.nn.recurrent",
            "spmd": "shardflax.nn.spmd",
            "summary": "shardflax.nn.summary",
            "transforms": "shardflax.nn.transforms",
        },
    )

__all__ = [
    "PARTITION_NAME",
    "RNN",
    "AxisMetadata",
    "BatchApply",
    "BatchNorm",
    "Bidirectional",
    "CollectionFilter",
    "Conv",
    "ConvLSTMCell",
    "ConvLocal",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "DenyList",
    "Dropout",
    "Einsum",
    "Embed",
    "Fp8DirectDotGeneralOp",
    "Fp8DotGeneral",
    "Fp8DotGeneralBase",
    "Fp8DotGeneralOp",
    "Fp8Einsum",
    "FrozenDict",
    "GRUCell",
    "GroupNorm",
    "GroupedQueryAttention",
    "In",
    "InstanceNorm",
    "LSTMCell",
    "LayerNorm",
    "LogicallyPartitioned",
    "MGUCell",
    "Module",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "NANOOFp8DotGeneralOp",
    "OptimizedLSTMCell",
    "Out",
    "PReLU",
    "Partitioned",
    "Policy",
    "RMSNorm",
    "RNNCellBase",
    "RulesFallback",
    "SelfAttention",
    "Sequential",
    "SimpleCell",
    "SpectralNorm",
    "Variable",
    "WeightNorm",
    "activation",
    "add_metadata_axis",
    "apply",
    "apply_rotary",
    "avg_pool",
    "broadcast",
    "celu",
    "checkpoint",
    "combine_masks",
    "compact",
    "compact_name_scope",
    "cond",
    "custom_vjp",
    "disable_named_call",
    "dot_product_attention",
    "dot_product_attention_weights",
    "dtypes",
    "elu",
    "enable_named_call",
    "flash_attention",
    "fold_rngs",
    "fp8_ops",
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
    "identity",
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
    "max_pool",
    "merge_param",
    "meta",
    "min_pool",
    "mish",
    "module",
    "named_call",
    "normalize",
    "nowrap",
    "one_hot",
    "ones",
    "ones_init",
    "override_named_call",
    "pool",
    "recurrent",
    "relu",
    "relu6",
    "remat",
    "remat_scan",
    "rotary_angles",
    "scan",
    "selu",
    "set_logical_axis_rules",
    "share_scope",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "spmd",
    "squareplus",
    "standardize",
    "summary",
    "swish",
    "switch",
    "tabulate",
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
