"""Tables of modules against Linen's, as text; and what Linen cannot count."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from tests.core.harness import OURS, THEIRS, quick_key, same

KEY = quick_key(0)
X = jnp.ones((16, 9))
PLAIN: dict[str, Any] = {"console_kwargs": {"force_terminal": False, "width": 200}}


def network(nn: Any) -> Any:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Lin(4)(x)
            return nn.Lin(2)(h), {"hidden": h}

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, n: Any = None, *, extra: Any = None, flag: bool = True) -> Any:
            inner = Inner(name="shared")
            inner(x)
            y, _ = inner(x)
            options: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            z = nn.vmap(nn.Lin, axis_size=16, **options)(9)(x)
            init = nn.with_partitioning(lambda key, shape: jnp.ones(shape), ("a", "b"))
            return self.helper(y), z, self.param("p", init, (3, 4))

        def helper(self, x: Any) -> Any:
            return 2 * x

    return Outer()


def test_the_seeds_example() -> None:
    def program(nn: Any) -> Any:
        class Foo(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Lin(2)(nn.Lin(4)(x))

        return Foo().tabulate(KEY, X, **PLAIN), nn.tabulate(Foo(), KEY, **PLAIN)(X)

    text = same(program)[0]
    assert "Foo Summary" in text and "Total Parameters: 50 (200 B)" in text


def test_in_colour() -> None:
    wide: Any = {"console_kwargs": {"force_terminal": True, "width": 200}}
    same(lambda nn: network(nn).tabulate(KEY, X, **wide))


def test_inputs_of_all_kinds() -> None:
    extra = {"a": X, "r": (X[0], None, "text", [2.5, True])}
    same(lambda nn: network(nn).tabulate(KEY, X, 3, extra=extra, flag=False, **PLAIN))
    shape = jax.ShapeDtypeStruct((16, 9), jnp.bfloat16)
    assert "bfloat16[16,9]" in network(OURS).tabulate(KEY, shape, **PLAIN)


def test_depth() -> None:
    for depth in (0, 1):
        same(lambda nn, depth=depth: network(nn).tabulate(KEY, X, depth=depth, **PLAIN))


def test_options_of_the_table() -> None:
    options: Any = {
        "table_kwargs": {"title_style": "bold", "padding": (0, 2)},
        "column_kwargs": {"justify": "right"},
    }
    same(lambda nn: network(nn).tabulate(KEY, X, **options, **PLAIN))


def test_of_another_method() -> None:
    same(lambda nn: nn.Lin().tabulate(KEY, X, method="__call__", mutable=["params"], **PLAIN))


def test_repeated_calls() -> None:
    text = network(OURS).tabulate(KEY, X, show_repeated=True, **PLAIN)
    cells = re.findall(r"^│ (\S*) +│ (\S+(?: \(\w+\))?) ", text, re.M)
    assert [c for c in cells if c[1] != "│"] == [
        ("", "Outer"),
        ("shared", "Inner"),
        ("shared/Lin_0", "Lin"),
        ("shared/Lin_1", "Lin"),
        ("shared", "Inner"),
        ("shared/Lin_0", "Lin"),
        ("shared/Lin_1", "Lin"),
        ("VmapLin_0", "Lin"),
        ("", "Outer (helper)"),
    ]


def test_collections_are_columns() -> None:
    class Two(OURS.Module):
        @OURS.compact
        def __call__(self, x: Any) -> Any:
            return OURS.Lin(9)(OURS.Count()(x))

    text = Two().tabulate(KEY, X, **PLAIN)
    assert re.search(r"path +┃ module ┃ inputs +┃ outputs +┃ state +┃ params", text)
    assert "count: int32[]" in text and "total: float32[16,9]" in text
    assert re.search(r"Total │ 145 \(580 B\) +│ 90 \(360 B\)", text)
    assert "Total Parameters: 235 (940 B)" in text


def flops(model: Any) -> dict[str, list[int]]:
    text = model.tabulate(KEY, X, compute_flops=True, compute_vjp_flops=True, **PLAIN)
    rows = re.findall(r"^│ (\S*) *│ \w+ +│[^│]*│[^│]*│ (\d+) +│ (\d+) ", text, re.M)
    return {path: [int(a), int(b)] for path, a, b in rows}


def test_flops_are_those_of_linen() -> None:
    def network(nn: Any) -> Any:
        class Foo(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Lin(2, name="b")(nn.Lin(4, name="a")(x))

        return Foo()

    ours, theirs = flops(network(OURS)), flops(network(THEIRS))
    sizes = {"": 50, "a": 40, "b": 10}
    assert {p: f[0] for p, f in ours.items()} == {p: f[0] for p, f in theirs.items()}
    # Linen differentiates the variables that come out, too: one addition for each parameter.
    assert {p: f[1] + sizes[p] for p, f in ours.items()} == {p: f[1] for p, f in theirs.items()}


def test_flops_inside_of_lifts() -> None:
    found = flops(network(OURS))
    assert found["VmapLin_0"] == [2 * 81 + 9, 2 * 81 + 9 + 2 * 2 * 81]
    assert found["shared"][0] == 2 * 16 * (9 * 4 + 4 * 2) + 16 * (4 + 2)


def test_a_table_costs_no_memory() -> None:
    shape = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    text = OURS.Lin(10**6).tabulate(KEY, shape, compute_flops=True, **PLAIN)
    assert "1,000,001,000,000 (4.0 TB)" in text


def test_module_paths() -> None:
    def program(nn: Any) -> Any:
        model = network(nn)
        found = {k: type(m).__name__ for k, m in model.module_paths(KEY, X).items()}
        more = model.module_paths(KEY, X, show_repeated=True)
        return found, sorted(found) == sorted(more), [m.scope is None for m in more.values()]

    found = same(lambda nn: program(nn)[0])
    assert found == program(OURS)[0]
    assert program(OURS)[1] and all(program(OURS)[2])
    assert network(OURS).module_paths(KEY, X)["shared"].name is None


def test_methods_other_than_call_count() -> None:
    def program(nn: Any) -> Any:
        class Pair(nn.Module):
            def setup(self) -> None:
                self.layer = nn.jit(nn.Lin)()

            def encode(self, x: Any) -> Any:
                return self.layer(x)

        class M(nn.Module):
            def setup(self) -> None:
                self.a, self.b = Pair(), Pair()

            def both(self, x: Any) -> Any:
                return self.b.encode(self.a.encode(x))

            def __call__(self, x: Any) -> Any:
                return self.both(x)

        def shown(**options: Any) -> list[Any]:
            text = M().tabulate(KEY, X, **PLAIN, **options)
            return re.findall(r"^│ (\S*) +│ (\w+(?: \(\w+\))?) ", text, re.M)

        return shown(), shown(depth=1), shown(method="both"), [*M().module_paths(KEY, X)]

    assert same(program)[0][1] == ("a", "Pair (encode)")
