"""The API reference of Linen: every name is there, and takes the parameters that it documents."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

# module of shardflax -> name(parameters), from Linen's reference; of errors only the names.  Left
# out: what JAX and Flax have dropped since (`initial` of softmax, `cell_size` of RNN).
REFERENCE = {
    "config": """
        update(name, value)
    """,
    "configurations": """
        define_bool_state(name, default, help)
        static_bool_env(varname, default)
    """,
    "core.frozen_dict": """
        FrozenDict()
        copy(x, add_or_replace)
        freeze(xs)
        pop(x, key)
        pretty_repr(x, num_spaces)
        unfreeze(x)
    """,
    "jax_utils": """
        pad_shard_unpad(wrapped, static_argnums, static_argnames, static_return)
        partial_eval_by_shape(fn, input_spec)
        pmean(xs, axis_name)
        prefetch_to_device(iterator, size, devices)
        replicate(tree, devices)
        unreplicate(tree)
    """,
    "nn": """
        BatchApply()
        BatchNorm(use_running_average, axis, momentum, epsilon, dtype, param_dtype,
            use_bias, use_scale, bias_init, scale_init, axis_name, axis_index_groups,
            parent, name)
        Bidirectional(forward_rnn, backward_rnn, merge_fn, time_major, return_carry, parent,
            name)
        Conv(features, kernel_size, strides, padding, input_dilation, kernel_dilation,
            feature_group_count, use_bias, mask, dtype, param_dtype, precision, kernel_init,
            bias_init, conv_general_dilated, parent, name)
        ConvLSTMCell()
        ConvLocal(features, kernel_size, strides, padding, input_dilation, kernel_dilation,
            feature_group_count, use_bias, mask, dtype, param_dtype, precision, kernel_init,
            bias_init, conv_general_dilated, parent, name)
        ConvTranspose(features, kernel_size, strides, padding, kernel_dilation, use_bias,
            mask, dtype, param_dtype, precision, kernel_init, bias_init, transpose_kernel,
            parent, name)
        Dense(features, use_bias, dtype, param_dtype, precision, kernel_init, bias_init,
            dot_general, parent, name)
        DenseGeneral(features, axis, batch_dims, use_bias, dtype, param_dtype, kernel_init,
            bias_init, precision, dot_general, parent, name)
        DenyList()
        Dropout(rate, broadcast_dims, deterministic, rng_collection, parent, name)
        Einsum()
        Embed(num_embeddings, features, dtype, param_dtype, embedding_init, parent, name)
        GRUCell(gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init,
            dtype, param_dtype, parent, name)
        GroupNorm(num_groups, group_size, epsilon, dtype, param_dtype, use_bias, use_scale,
            bias_init, scale_init, axis_name, axis_index_groups, parent, name)
        InstanceNorm()
        LSTMCell(gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init,
            dtype, param_dtype, parent, name)
        LayerNorm(epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
            reduction_axes, feature_axes, axis_name, axis_index_groups, parent, name)
        LogicallyPartitioned(value, names, mesh, rules)
        MGUCell()
        Module()
        MultiHeadAttention()
        MultiHeadDotProductAttention(num_heads, dtype, param_dtype, qkv_features,
            out_features, broadcast_dropout, dropout_rate, deterministic, precision,
            kernel_init, bias_init, use_bias, attention_fn, decode, qkv_dot_general,
            out_dot_general, parent, name)
        OptimizedLSTMCell(gate_fn, activation_fn, kernel_init, recurrent_kernel_init,
            bias_init, dtype, param_dtype, parent, name)
        PReLU(param_dtype, negative_slope_init, parent, name)
        Partitioned(value, names, mesh)
        RMSNorm()
        RNN(cell, time_major, return_carry, reverse, keep_order, unroll,
            variable_axes, variable_broadcast, variable_carry, split_rngs, parent, name)
        RNNCellBase(parent, name)
        SelfAttention(num_heads, dtype, param_dtype, qkv_features, out_features,
            broadcast_dropout, dropout_rate, deterministic, precision, kernel_init,
            bias_init, use_bias, attention_fn, decode, qkv_dot_general, out_dot_general,
            parent, name)
        Sequential(layers, parent, name)
        SimpleCell()
        SpectralNorm()
        Variable()
        WeightNorm()
        add_metadata_axis()
        apply(fn, module, mutable, capture_intermediates)
        avg_pool(inputs, window_shape, strides, padding, count_include_pad)
        broadcast()
        celu(x, alpha)
        checkpoint()
        combine_masks()
        compact(fun)
        cond(pred, true_fun, false_fun, mdl, variables, rngs)
        custom_vjp(fn, forward_fn, backward_fn, grad_vars, nondiff_argnums)
        disable_named_call()
        dot_product_attention(query, key, value, bias, mask, broadcast_dropout, dropout_rng,
            dropout_rate, deterministic, dtype, precision)
        dot_product_attention_weights(query, key, bias, mask, broadcast_dropout,
            dropout_rng, dropout_rate, deterministic, dtype, precision)
        elu(x, alpha)
        enable_named_call()
        fold_rngs()
        gelu(x, approximate)
        get_logical_axis_rules()
        get_partition_spec(tree)
        get_sharding(tree, mesh)
        glu(x, axis)
        grad()
        hard_sigmoid(x)
        hard_silu(x)
        hard_swish(x)
        hard_tanh(x)
        init(fn, module, mutable, capture_intermediates)
        init_with_output(fn, module, mutable, capture_intermediates)
        intercept_methods()
        jit(target, variables, rngs, static_argnums, donate_argnums, device, backend,
            methods)
        jvp(fn, mdl, primals, tangents, variable_tangents, variables, rngs)
        leaky_relu(x, negative_slope)
        log_sigmoid(x)
        log_softmax(x, axis, where)
        logical_axis_rules(rules)
        logical_to_mesh(tree, rules)
        logical_to_mesh_axes(array_dim_names, rules)
        logical_to_mesh_sharding(tree, mesh, rules)
        logsumexp(a, axis, b, keepdims, return_sign)
        make_attention_mask(query_input, key_input, pairwise_fn, extra_batch_dims, dtype)
        make_causal_mask(x, extra_batch_dims, dtype)
        map_variables(target, mapped_collections, trans_in_fn, trans_out_fn, init, mutable,
            rngs, variables, methods)
        max_pool(inputs, window_shape, strides, padding)
        merge_param()
        meta()
        min_pool()
        named_call()
        nowrap(fun)
        one_hot(x, num_classes, dtype, axis)
        override_named_call(enable)
        pool(inputs, init, reduce_fn, window_shape, strides, padding)
        relu()
        relu6()
        remat(target, variables, rngs, concrete, prevent_cse, static_argnums, policy,
            methods)
        remat_scan(target, lengths, policy, variable_broadcast, variable_carry,
            variable_axes, split_rngs)
        scan(target, variable_axes, variable_broadcast, variable_carry, split_rngs, in_axes,
            out_axes, length, reverse, unroll, data_transform, metadata_params, methods)
        selu(x)
        set_logical_axis_rules(rules)
        share_scope()
        sigmoid(x)
        silu(x)
        soft_sign(x)
        softmax(x, axis, where)
        softplus(x)
        standardize(x, axis, mean, variance, epsilon, where)
        swish(x)
        switch(index, branches, mdl, variables, rngs)
        tabulate(module, rngs, depth, show_repeated, mutable, console_kwargs)
        tanh(x)
        unbox()
        value_and_grad()
        vjp(fn, mdl, has_aux, reduce_axes, vjp_variables, variables, rngs)
        vmap(target, variable_axes, split_rngs, in_axes, out_axes, axis_size, axis_name,
            spmd_axis_name, metadata_params, methods)
        while_loop(cond_fn, body_fn, mdl, init, carry_variables, broadcast_variables,
            split_rngs)
        with_logical_constraint(x, logical_axis_resources, rules, mesh, fallback)
        with_logical_partitioning(fn, names, mesh, rules)
        with_partitioning(fn, names, mesh)
    """,
    "nn.initializers": """
        constant(value, dtype)
        delta_orthogonal(scale, column_axis, dtype)
        glorot_normal(in_axis, out_axis, batch_axis, dtype)
        glorot_uniform(in_axis, out_axis, batch_axis, dtype)
        he_normal(in_axis, out_axis, batch_axis, dtype)
        he_uniform(in_axis, out_axis, batch_axis, dtype)
        kaiming_normal(in_axis, out_axis, batch_axis, dtype)
        kaiming_uniform(in_axis, out_axis, batch_axis, dtype)
        lecun_normal(in_axis, out_axis, batch_axis, dtype)
        lecun_uniform(in_axis, out_axis, batch_axis, dtype)
        normal(stddev, dtype)
        ones(key, shape, dtype)
        ones_init()
        orthogonal(scale, column_axis, dtype)
        uniform(scale, dtype)
        variance_scaling(scale, mode, distribution, in_axis, out_axis, batch_axis, dtype)
        xavier_normal(in_axis, out_axis, batch_axis, dtype)
        xavier_uniform(in_axis, out_axis, batch_axis, dtype)
        zeros(key, shape, dtype)
        zeros_init()
    """,
    "serialization": """
        from_bytes(target, encoded_bytes)
        from_state_dict(target, state, name)
        msgpack_restore(encoded_pytree)
        msgpack_serialize(pytree, in_place)
        register_serialization_state(ty, ty_to_state_dict, ty_from_state_dict, override)
        to_bytes(target)
        to_state_dict(target)
    """,
    "traceback_util": """
        hide_flax_in_tracebacks()
        show_flax_in_tracebacks()
    """,
    "training.checkpoints": """
        AsyncManager(max_workers)
        convert_pre_linen(params)
        latest_checkpoint(ckpt_dir, prefix)
        restore_checkpoint(ckpt_dir, target, step, prefix, parallel, gda_manager,
            allow_partial_mpa_restoration, orbax_checkpointer, orbax_transforms)
        save_checkpoint(ckpt_dir, target, step, prefix, keep, overwrite, keep_every_n_steps,
            async_manager, orbax_checkpointer)
        save_checkpoint_multiprocess(ckpt_dir, target, step, prefix, keep, overwrite,
            keep_every_n_steps, async_manager, gda_manager, orbax_checkpointer)
    """,
    "training.orbax_utils": """
        restore_args_from_target(target, mesh)
        save_args_from_target(target)
    """,
    "training.common_utils": """
        get_metrics(device_metrics)
        onehot(labels, num_classes, on_value, off_value)
        shard(xs)
        shard_prng_key(prng_key)
        stack_forest(forest)
    """,
    "training.dynamic_scale": """
        DynamicScale(growth_factor, backoff_factor, growth_interval, fin_steps, scale,
            minimum_scale)
    """,
    "training.early_stopping": """
        EarlyStopping(min_delta, patience, best_metric, patience_count, should_stop)
    """,
    "training.lr_schedule": """
        create_constant_learning_rate_schedule(base_learning_rate, steps_per_epoch,
            warmup_length)
        create_cosine_learning_rate_schedule(base_learning_rate, steps_per_epoch,
            halfcos_epochs, warmup_length)
        create_stepped_learning_rate_schedule(base_learning_rate, steps_per_epoch,
            lr_sched_steps, warmup_length)
    """,
    "training.train_state": """
        TrainState(step, apply_fn, params, tx, opt_state)
    """,
    "traverse_util": """
        ModelParamTraversal()
        Traversal()
        TraverseAttr()
        TraverseCompose()
        TraverseEach()
        TraverseFilter()
        TraverseId()
        TraverseItem()
        TraverseMerge()
        TraverseTree()
        flatten_dict(xs, keep_empty_nodes, is_leaf, sep)
        path_aware_map(f, nested_dict)
        unflatten_dict(xs, sep)
    """,
    "errors": """
        AlreadyExistsError()
        InvalidCheckpointError()
        MPACheckpointingRequiredError()
        MPARestoreDataCorruptedError()
        MPARestoreTargetRequiredError()
        MPARestoreTypeNotMatchError()
        ApplyModuleInvalidMethodError()
        ApplyScopeInvalidVariablesStructureError()
        ApplyScopeInvalidVariablesTypeError()
        AssignSubModuleError()
        CallCompactUnboundModuleError()
        CallSetupUnboundModuleError()
        CallUnbindOnUnboundModuleError()
        DescriptorAttributeError()
        IncorrectPostInitOverrideError()
        InvalidFilterError()
        InvalidInstanceModuleError()
        InvalidRngError()
        InvalidScopeError()
        JaxTransformError()
        LazyInitError()
        ModifyScopeVariableError()
        MultipleMethodsCompactError()
        NameInUseError()
        PartitioningUnspecifiedError()
        ReservedModuleAttributeError()
        ScopeCollectionNotFound()
        ScopeParamNotFoundError()
        ScopeParamShapeError()
        ScopeVariableNotFoundError()
        SetAttributeFrozenModuleError()
        SetAttributeInModuleSetupError()
        TransformTargetError()
        TransformedMethodReturnValueError()
    """,
    "core": """
        AxisMetadata()
        DenyList(deny)
        FrozenDict()
        Scope(variables, rngs, mutable)
        Variable(scope, collection, name, unbox)
        apply(fn, mutable, flags)
        bind(variables, rngs, mutable, flags)
        check_trace_level(base_level)
        copy(x, add_or_replace)
        current_trace()
        freeze(xs)
        init(fn, mutable, flags)
        lazy_init(fn, mutable, flags)
        map_axis_meta(fn, tree)
        pop(x, key)
        pretty_repr(x, num_spaces)
        unbox(tree)
        unfreeze(x)
    """,
    "core.lift": """
        checkpoint(fn, variables, rngs, concrete, prevent_cse, static_argnums, policy)
        cond(pred, true_fun, false_fun, scope, variables, rngs)
        custom_vjp(fn, forward_fn, backward_fn, grad_vars, nondiff_argnums)
        fold_rngs(fn, variables, rngs)
        jit(fn, variables, rngs, static_argnums, donate_argnums)
        jvp(fn, scope, primals, tangents, variable_tangents, variables, rngs)
        map_variables(fn, mapped_collections, map_in_fn, map_out_fn, init, mutable, rngs, variables)
        pack(fn, in_variable_filters, out_variable_filters, rng_filters)
        remat(fn, variables, rngs, concrete, prevent_cse, static_argnums, policy)
        remat_scan(body_fn, lengths, policy, variable_broadcast, variable_carry, variable_axes)
        scan(fn, variable_axes, variable_broadcast, variable_carry, split_rngs, in_axes, out_axes)
        switch(index, branches, scope, variables, rngs)
        value_and_grad(fn, scope, has_aux, reduce_axes, variables, rngs)
        vjp(fn, scope, has_aux, reduce_axes, vjp_variables, variables, rngs)
        vmap(fn, variable_axes, split_rngs, in_axes, out_axes, axis_size, axis_name)
        while_loop(cond_fn, body_fn, scope, init, carry_variables, broadcast_variables, split_rngs)
    """,
    "core.meta": """
        AxisMetadata()
        add_axis(tree, index, params)
        is_axis_metadata()
        map_axis_meta(fn, tree)
        remove_axis(tree, index, params)
        replace_boxed(tree)
        unbox(tree)
    """,
    "nn.meta": """
        Partitioned(value, names, mesh)
        get_partition_spec(tree)
        get_sharding(tree, mesh)
        with_partitioning(fn, names, mesh)
    """,
    "core.tracers": """
        check_trace_level(base_level)
        current_trace()
    """,
    "cursor": """
        Cursor(obj, parent_key)
        cursor(obj)
    """,
    "struct": """
        PyTreeNode()
        dataclass(clz)
        field(pytree_node, metadata)
    """,
}

# Arguments that are passed by position: modules and scopes stand there alike.
POSITIONAL = {"target", "fn", "body_fn", "scope", "mdl"}


def documented() -> Iterator[Any]:
    for module, text in REFERENCE.items():
        for name, parameters in re.findall(r"(\w+)\(([^)]*)\)", text):
            found = re.split(r",\s*", parameters) if parameters else []
            yield pytest.param(f"shardflax.{module}", name, found, id=f"{module}.{name}")


@pytest.mark.parametrize(("module", "name", "parameters"), [*documented()])
def test_name_is_there_and_takes_its_parameters(
    module: str, name: str, parameters: list[str]
) -> None:
    value = getattr(importlib.import_module(module), name)
    if not parameters:
        return
    assert callable(value)
    taken = inspect.signature(value).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    missing = [p for p in parameters if p not in taken and p not in POSITIONAL]
    assert not missing, f"{module}.{name} takes {list(taken)}"
