"""The same class of error in the same situation as Linen, and what ours say."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.core.harness import quick_key, same_error

KEY = quick_key(0)
X = jnp.ones((2, 3))
CASES: list[Any] = []


def raises(name: str, *texts: str) -> Any:
    """Registers a program that raises `name`; our message holds `texts`."""

    def register(program: Any) -> Any:
        CASES.append(pytest.param(program, name, texts, id=program.__name__))
        return program

    return register


@pytest.mark.parametrize(("program", "name", "texts"), CASES)
def test_same_error(program: Any, name: str, texts: tuple[str, ...]) -> None:
    message = same_error(program, name)
    for text in texts:
        assert text in message, message


def calling(nn: Any, body: Any, **fields: Any) -> Any:
    """A compact module whose call is `body(self, x)`."""

    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return body(self, x)

    return M(**fields)


# --- variables


@raises("ScopeParamNotFoundError", "at /Lin_0", "'kernel'", "known: bias.", "another model")
def missing_parameter(nn: Any) -> None:
    model = calling(nn, lambda self, x: nn.Lin()(x))
    model.apply({"params": {"Lin_0": {"bias": jnp.ones(3)}}}, X)


@raises("ApplyScopeInvalidVariablesTypeError", "dict for the collection 1")
def collections_without_names(nn: Any) -> None:
    nn.Lin().apply({1: {}}, X)


@raises("ScopeCollectionNotFound", "'params'", "'kernel'")
def no_parameters_at_all(nn: Any) -> None:
    nn.Lin().apply({}, X)


@raises("ScopeParamNotFoundError", "'kernel'", "at /Lin_0")
def no_parameters_below(nn: Any) -> None:
    model = calling(nn, lambda self, x: nn.Lin()(x))
    model.apply({"params": {"other": {"bias": jnp.ones(3)}}}, X)


@raises("ScopeCollectionNotFound", "'state'", "mutable=['state']")
def missing_collection(nn: Any) -> None:
    nn.Count().apply({}, X)


@raises("ScopeVariableNotFoundError", "'state'", "'total'", "known: count")
def missing_variable(nn: Any) -> None:
    nn.Count().apply({"state": {"count": jnp.int32(0)}}, X)


@raises("ScopeParamShapeError", "at /Lin_0", "'kernel'", "3x3", "5x3", "dim 0: 3 against 5")
def wrong_shape(nn: Any) -> None:
    model = calling(nn, lambda self, x: nn.Lin()(x))
    model.apply({"params": {"Lin_0": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}}, X)


@raises("ModifyScopeVariableError", "at /Count_0", "'count'", "'state'", "mutable=['state']")
def write_to_immutable(nn: Any) -> None:
    model = calling(nn, lambda self, x: nn.Count()(x))
    model.apply(model.init(KEY, X), X)


@raises("ModifyScopeVariableError", "'w'")
def put_to_immutable(nn: Any) -> None:
    calling(nn, lambda self, x: self.put_variable("params", "w", x)).apply({}, X)


@raises("ApplyScopeInvalidVariablesStructureError", "params")
def params_wrapped_twice(nn: Any) -> None:
    nn.Lin().apply({"params": nn.Lin().init(KEY, X)}, X)


@raises("ApplyScopeInvalidVariablesTypeError", "got int for the collection 'params'")
def variables_of_wrong_type(nn: Any) -> None:
    nn.Lin().apply({"params": 3}, X)


# --- streams


@raises("InvalidRngError", "'dropout'", "rngs={'dropout'")
def missing_stream(nn: Any) -> None:
    nn.Drop().apply({}, X)


@raises("InvalidRngError", "'params'")
def no_stream_for_params(nn: Any) -> None:
    nn.Lin().init({"dropout": KEY}, X)


@raises("InvalidRngError", "expected a key")
def seed_is_no_key(nn: Any) -> None:
    nn.Lin().init(3.5, X)


@raises("InvalidRngError", "expected a key")
def several_keys(nn: Any) -> None:
    nn.Lin().init(jax.random.split(KEY, 3), X)


@raises("InvalidFilterError", "got int: 3")
def no_filter(nn: Any) -> None:
    nn.Lin().init(KEY, X, mutable=3)


@raises("InvalidRngError")
def stream_left_out_of_a_lift(nn: Any) -> None:
    model = nn.scan(nn.Drop, split_rngs={}, length=2)
    nn.vmap(nn.Drop, split_rngs={})().apply({}, X, rngs={"dropout": KEY})
    del model


# --- names


@raises("NameInUseError", "'a'", "submodule")
def same_name_twice(nn: Any) -> None:
    calling(nn, lambda self, x: nn.Lin(name="a")(nn.Lin(name="a")(x))).init(KEY, X)


@raises("NameInUseError", "'w'", "variable")
def same_param_twice(nn: Any) -> None:
    calling(
        nn, lambda self, x: self.param("w", nn.uniform, (2,)) + self.param("w", nn.uniform, (2,))
    ).init(KEY, X)


@raises("NameInUseError", "'a'")
def param_named_as_submodule(nn: Any) -> None:
    def body(self: Any, x: Any) -> Any:
        nn.Lin(name="a")(x)
        return self.param("a", nn.uniform, (2,))

    calling(nn, body).init(KEY, X)


@raises("NameInUseError", "'a'")
def setup_param_named_as_submodule(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()
            self.b = self.param("a", nn.uniform, (2,))

        def __call__(self, x: Any) -> Any:
            return self.a(x)

    M().init(KEY, X)


@raises("NameInUseError", "'a'")
def submodule_named_as_attribute(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = nn.Lin()

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin(name="a")(self.a(x))

    M().init(KEY, X)


# --- modules


@raises("AssignSubModuleError", "Lin", "compact")
def submodule_outside_of_compact(nn: Any) -> None:
    class M(nn.Module):
        def __call__(self, x: Any) -> Any:
            return nn.Lin()(x)

    M().init(KEY, X)


@raises("NameInUseError", "at /", "'a'")
def submodule_named_as_perturbation(nn: Any) -> None:
    calling(nn, lambda self, x: (self.perturb("a", x), nn.Lin(name="a")(x))).init(KEY, X)


@raises("TypeError", "unsupported operand")
def sown_where_no_tuple_is(nn: Any) -> None:
    model = calling(nn, lambda self, x: self.sow("state", "a", x))
    model.apply({"state": {"a": X}}, X, mutable=["state"])


@raises("SetAttributeInModuleSetupError", "M.setup", "'parent'")
def parent_set_in_setup(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.parent = None

        def __call__(self) -> None:
            pass

    M().apply({})


@raises("ReservedModuleAttributeError", "'name'")
def reserved_name(nn: Any) -> None:
    class M(nn.Module):
        name: Any = None


@raises("CallCompactUnboundModuleError", "Lin", ".apply(variables, x)")
def unbound_call(nn: Any) -> None:
    nn.Lin()(X)


@raises("CallUnbindOnUnboundModuleError", "bind")
def unbind_unbound(nn: Any) -> None:
    nn.Lin().unbind()


@raises("InvalidInstanceModuleError", "Model(...).init(key, x)")
def init_of_a_class(nn: Any) -> None:
    nn.Lin.init(KEY, X)


@raises("InvalidInstanceModuleError")
def apply_of_a_class(nn: Any) -> None:
    nn.Lin.apply({}, X)


@raises("ApplyModuleInvalidMethodError", "3")
def method_is_a_number(nn: Any) -> None:
    nn.Lin().apply({}, X, method=3)


@raises("AttributeError", "no_such")
def method_does_not_exist(nn: Any) -> None:
    nn.Lin().apply({}, X, method="no_such")


@raises("SetAttributeFrozenModuleError", "Lin.features", "clone(features=")
def set_outside_of_setup(nn: Any) -> None:
    nn.Lin().bind({}).features = 3


@raises("SetAttributeFrozenModuleError", "Lin.features")
def set_on_a_child_in_setup(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()
            self.layer.features = 2

        def __call__(self, x: Any) -> Any:
            return self.layer(x)

    M().init(KEY, X)


@raises("SetAttributeFrozenModuleError", "extra")
def set_in_compact(nn: Any) -> None:
    calling(nn, lambda self, x: setattr(self, "extra", x)).init(KEY, X)


@raises("SetAttributeInModuleSetupError", "'width'")
def field_set_in_setup(nn: Any) -> None:
    class M(nn.Module):
        width: int = 1

        def setup(self) -> None:
            self.width = 2

        def __call__(self) -> Any:
            return self.width

    M().init(KEY)


@raises("IncorrectPostInitOverrideError", "super().__post_init__()")
def post_init_without_super(nn: Any) -> None:
    class M(nn.Module):
        def __post_init__(self) -> None:
            pass

        @nn.compact
        def __call__(self) -> Any:
            return 1

    M().init(KEY)


@raises("AttributeError", "no_such")
def missing_attribute(nn: Any) -> None:
    calling(nn, lambda self, x: self.no_such).init(KEY, X)


# --- transforms


@raises("TransformTargetError", "Module class")
def lift_of_an_instance(nn: Any) -> None:
    nn.jit(nn.Lin())


@raises("ScopeCollectionNotFound", "'count'", "'state'")
def collection_left_out_of_a_lift(nn: Any) -> None:
    model = nn.remat(nn.Count, variables=["params"])()
    variables = nn.Count().init(KEY, X)
    model.apply(variables, X, mutable=["state"])


@raises("InvalidRngError", "'params'", "split_rngs")
def stream_of_params_left_out(nn: Any) -> None:
    nn.vmap(nn.Lin, variable_axes={"params": 0})().init(KEY, X)


# --- the rest of the catalogue


@raises("CallSetupUnboundModuleError", "M is bound to no variables", "nn.apply(lambda m:")
def setup_by_hand(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.layer = nn.Lin()

    M().setup()


@raises("DescriptorAttributeError", "M.prop", "M has no attribute 'non_existent_field'")
def property_of_a_missing_field(nn: Any) -> None:
    class M(nn.Module):
        @property
        def prop(self) -> Any:
            return self.non_existent_field

        def __call__(self, x: Any) -> Any:
            return self.prop

    M().init(KEY, X)


@raises("DescriptorAttributeError", "M.prop")
def inherited_property_of_a_missing_field(nn: Any) -> None:
    class Base(nn.Module):
        @property
        def prop(self) -> Any:
            return hasattr(self, "prop_of_that") or self.non_existent_field

    class M(Base):
        pass

    assert not hasattr(M(), "no_such")
    getattr(M(), "prop", None)


@raises("DescriptorAttributeError", "M.prop")
def cached_property_of_a_missing_field(nn: Any) -> None:
    class M(nn.Module):
        @functools.cached_property
        def prop(self) -> Any:
            return self.non_existent_field

    M().bind({}).prop  # noqa: B018


@raises("KeyError", "'a'")
def property_that_fails(nn: Any) -> None:
    class M(nn.Module):
        @property
        def prop(self) -> Any:
            return {}["a"]

    M().prop  # noqa: B018


@raises("AttributeError", "'int' object has no attribute 'nope'")
def setup_that_fails(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.a = (3).nope  # pyright: ignore[reportAttributeAccessIssue]

        def __call__(self, x: Any) -> Any:
            return self.a

    M().init(KEY, X)


@raises("CallShareScopeOnUnboundModuleError", "Lin is not bound", "nn.share_scope(self")
def share_scope_of_unbound_modules(nn: Any) -> None:
    nn.share_scope(nn.Lin(), nn.Lin())


@raises("NameInUseError", "at /", "'kernel'")
def shared_scope_collides(nn: Any) -> None:
    class M(nn.Module):
        base: Any

        def setup(self) -> None:
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.base(x) + self.param("kernel", nn.uniform, (3, 3)).sum()

    M(nn.Lin()).init(KEY, X)


@raises("TransformedMethodReturnValueError", "method __call__ returns a Lin")
def lifted_method_returns_a_module(nn: Any) -> None:
    class M(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Lin()

    M().init(KEY, X)


@raises("TransformedMethodReturnValueError", "returns a Variable")
def lifted_method_returns_a_variable(nn: Any) -> None:
    class M(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return {"a": [self.variable("state", "v", lambda: 1)]}

    nn.remat(M)().init(KEY, X)


@raises("InvalidInstanceModuleError", "Model(...).init(key, x)")
def bind_of_a_class(nn: Any) -> None:
    nn.Lin.bind({}, {})


@raises("AssignSubModuleError", "Lin")
def partial_of_a_module_in_setup(nn: Any) -> None:
    class M(nn.Module):
        def setup(self) -> None:
            self.make = functools.partial(nn.Lin, use_bias=False)

        def __call__(self, x: Any) -> Any:
            return self.make(features=4)(x)

    M().init(KEY, X)


@raises("ValueError", "expected the module whose")
def parent_of_wrong_type(nn: Any) -> None:
    try:
        nn.Lin(parent="text")
    except ValueError as error:
        raise ValueError(*error.args) from error


@raises("TypeError", "Lin is bound to variables and cannot be hashed")
def hash_of_a_bound_module(nn: Any) -> None:
    try:
        hash(nn.Lin().bind({}))
    except TypeError as error:
        raise TypeError(*error.args) from error


@raises("ReservedModuleAttributeError", "'parent'")
def reserved_parent(nn: Any) -> None:
    class M(nn.Module):
        parent: Any = None


@raises("ScopeParamShapeError", "'tree'", "declared as")
def wrong_shape_in_a_tree(nn: Any) -> None:
    def body(self: Any, x: Any) -> Any:
        return self.param("tree", lambda key: {"a": jnp.ones(2)})["a"]

    calling(nn, body).apply({"params": {"tree": {"a": jnp.ones(3)}}}, X)
