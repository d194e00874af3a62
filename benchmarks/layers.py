"""What layers cost once they are compiled, beside the same functions by hand (`by_hand.py`).

    python benchmarks/layers.py
    python benchmarks/layers.py --only Dense --rounds 5

Forward and backward of each layer, to parameters and inputs, are compiled for this machine's
processor.  XLA's figures for the two programs (operations, bytes) do not depend on what else the
machine does and are compared exactly; the times are taken in turn, and their ratio is the median
over the rounds.  Prints the table and writes it, with the command that gave it, to
`benchmarks/results/layers.json` and `.md` (not with `--only`).

    python benchmarks/layers.py --programs

compiles all programs anew and compares them, and leaves the times of the last run as they are.

The column *program* says what XLA made of the two: "same" is the same instructions in the same
order, "same operations" the same ones in another order or in other loops, "differs" anything else.
Where it is "same", a time other than 1.00 is the noise of the machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shardflax.nn as nn
from benchmarks.by_hand import BY_HAND, STATEFUL, through_jax
from benchmarks.compiled import cost_of, instructions
from benchmarks.operations import operations
from benchmarks.report import machine
from benchmarks.timing import in_turn

__all__ = ["CASES", "Case", "Result", "figures", "measure"]

RESULTS = Path(__file__).parent / "results" / "layers.json"
SIZES = {"batch": 8, "length": 64, "width": 256, "side": 16, "channels": 64}
SMALL = {"batch": 2, "length": 4, "width": 8, "side": 4, "channels": 8}
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A layer, its inputs (functions of the sizes), and what it is compared with."""

    name: str
    layer: Callable[[dict[str, int]], nn.Module]
    inputs: Callable[[dict[str, int]], Inputs]
    by_hand: Callable[..., Any]
    call: Callable[..., Any] | None = None
    """Calls the layer with its inputs; by default with nothing else."""
    same_program: bool = True
    """By hand the same operations are written, so that XLA's figures are to be equal."""


def floats(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def hidden(s: dict[str, int]) -> Inputs:
    return (floats(s["batch"], s["length"], s["width"]),)


def images(s: dict[str, int]) -> Inputs:
    return (floats(s["batch"], s["side"], s["side"], s["channels"]),)


def ids(s: dict[str, int]) -> Inputs:
    return (jnp.asarray(np.random.RandomState(0).randint(0, 64, (s["batch"], s["length"]))),)


def one_step(s: dict[str, int]) -> Inputs:
    shape = s["batch"], s["width"]
    return floats(*shape), floats(*shape, seed=1)


def two_states(s: dict[str, int]) -> Inputs:
    shape = s["batch"], s["width"]
    return (floats(*shape), floats(*shape, seed=1)), floats(*shape, seed=2)


def two_images(s: dict[str, int]) -> Inputs:
    (x,) = images(s)
    return (x, x + 1), x - 1


def keyed(s: dict[str, int]) -> Inputs:
    return *hidden(s), jax.random.PRNGKey(0)


def operands(s: dict[str, int]) -> Inputs:
    return *hidden(s), floats(s["width"], s["width"], seed=1)


def case(
    name: str,
    layer: Callable[[dict[str, int]], nn.Module],
    inputs: Callable[..., Inputs],
    **kw: Any,
) -> Case:
    return Case(name, layer, inputs, BY_HAND[name], **kw)


def with_key(layer: Any, x: jax.Array, key: jax.Array) -> jax.Array:
    return layer(x, rng=key)


def updating(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x, update_stats=True)


def multiplying(layer: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return layer("bli,io->blo", x, kernel)


HALVED = {"window_shape": (2, 2), "strides": (2, 2)}
ATTENTION = "MultiHeadDotProductAttention"
CASES = (
    case("Dense", lambda s: nn.Dense(4 * s["width"]), hidden),
    case("DenseGeneral", lambda s: nn.DenseGeneral((4, s["width"] // 4)), hidden),
    case("Einsum", lambda s: nn.Einsum((s["width"], 4, s["width"] // 4), "bld,dhk->blhk"), hidden),
    case("Embed", lambda s: nn.Embed(64, s["width"]), ids),
    case(
        "Sequential",
        lambda s: nn.Sequential([nn.Dense(4 * s["width"]), nn.gelu, nn.Dense(s["width"])]),
        hidden,
    ),
    case("Conv", lambda s: nn.Conv(s["channels"], (3, 3)), images),
    case("ConvTranspose", lambda s: nn.ConvTranspose(s["channels"], (3, 3), (2, 2)), images),
    case("ConvLocal", lambda s: nn.ConvLocal(s["channels"], (3, 3)), images),
    case("max_pool", lambda s: nn.Sequential([functools.partial(nn.max_pool, **HALVED)]), images),
    case("avg_pool", lambda s: nn.Sequential([functools.partial(nn.avg_pool, **HALVED)]), images),
    case("Dropout", lambda s: nn.Dropout(0.5, deterministic=False), keyed, call=with_key),
    case("WeightNorm", lambda s: nn.WeightNorm(nn.Dense(s["width"])), hidden),
    case("SpectralNorm", lambda s: nn.SpectralNorm(nn.Dense(s["width"])), hidden, call=updating),
    case(
        "Fp8DirectDotGeneralOp",
        lambda s: nn.Dense(s["width"], dot_general_cls=nn.Fp8DirectDotGeneralOp),
        hidden,
    ),
    case(
        "Fp8DotGeneralOp",
        lambda s: nn.Dense(s["width"], dot_general_cls=nn.Fp8DotGeneralOp),
        hidden,
    ),
    case(
        "NANOOFp8DotGeneralOp",
        lambda s: nn.Dense(s["width"], dot_general_cls=nn.NANOOFp8DotGeneralOp),
        hidden,
    ),
    case("Fp8Einsum", lambda s: nn.Fp8Einsum(), operands, call=multiplying),
    case("LayerNorm", lambda s: nn.LayerNorm(), hidden),
    case("RMSNorm", lambda s: nn.RMSNorm(), hidden),
    case("BatchNorm", lambda s: nn.BatchNorm(use_running_average=False), images),
    case("InstanceNorm", lambda s: nn.InstanceNorm(), images),
    case("GroupNorm", lambda s: nn.GroupNorm(8), images),
    case("PReLU", lambda s: nn.PReLU(), images),
    case("SimpleCell", lambda s: nn.SimpleCell(s["width"]), one_step),
    case("GRUCell", lambda s: nn.GRUCell(s["width"]), one_step),
    case("LSTMCell", lambda s: nn.LSTMCell(s["width"]), two_states),
    Case(
        "OptimizedLSTMCell",
        lambda s: nn.OptimizedLSTMCell(s["width"]),
        two_states,
        BY_HAND["OptimizedLSTMCell"],
        same_program=False,  # gradients are summed in Linen's order
    ),
    case("MGUCell", lambda s: nn.MGUCell(s["width"]), one_step),
    case("ConvLSTMCell", lambda s: nn.ConvLSTMCell(s["channels"], (3, 3)), two_images),
    case("RNN", lambda s: nn.RNN(nn.LSTMCell(s["width"])), hidden),
    case(
        "Bidirectional",
        lambda s: nn.Bidirectional(nn.RNN(nn.GRUCell(s["width"])), nn.RNN(nn.GRUCell(s["width"]))),
        hidden,
    ),
    case(ATTENTION, lambda s: nn.MultiHeadDotProductAttention(4), hidden),
    case("MultiHeadAttention", lambda s: nn.MultiHeadAttention(4), hidden),
    case("SelfAttention", lambda s: nn.SelfAttention(4), hidden),
    case(
        "GroupedQueryAttention",
        lambda s: nn.GroupedQueryAttention(4, num_kv_heads=2, rope_theta=None),
        hidden,
    ),
    Case(
        f"{ATTENTION}, over `jax.nn.dot_product_attention`",
        lambda s: nn.MultiHeadDotProductAttention(4),
        hidden,
        through_jax,
        same_program=False,
    ),
)


@dataclass(frozen=True)
class Programs:
    """The jitted passes of a layer and of the same by hand, and what to call them with."""

    ours: dict[str, Any]
    by_hand: dict[str, Any]
    arguments: tuple[Any, Inputs, Any]


def programs(of: Case, sizes: dict[str, int], init: Callable[..., Any] = jax.jit) -> Programs:
    """The passes; `init` turns a function of nothing into variables, or into their shapes."""
    model, inputs = of.layer(sizes), of.inputs(sizes)
    call = of.call or type(model).__call__
    variables = init(lambda: model.init(jax.random.key(0), *inputs, method=call))()
    params = variables.get("params", {})
    others = {name: value for name, value in variables.items() if name != "params"}

    def layer(params: Any, inputs: Inputs, others: Any) -> Any:
        mutable = list(others)
        y = model.apply(
            {"params": params, **others}, *inputs, mutable=mutable or False, method=call
        )
        return y[0] if mutable else y

    def hand(params: Any, inputs: Inputs, others: Any) -> Any:
        given = {"params": params, **others} if of.name in STATEFUL else params
        return of.by_hand(given, *inputs)

    return Programs(passes(layer), passes(hand), (params, inputs, others))


def passes(fn: Callable[[Any, Inputs, Any], Any]) -> dict[str, Any]:
    """The forward pass, and the backward pass to parameters and inputs."""

    def loss(params: Any, inputs: Inputs, others: Any) -> jax.Array:
        total = jnp.zeros(())
        for y in jax.tree.leaves(fn(params, inputs, others)):
            total += jnp.sum(jnp.sin(y))
        return total

    gradient = jax.grad(loss, argnums=(0, 1), allow_int=True)
    return {"forward": jax.jit(fn), "backward": jax.jit(gradient)}


@dataclass(frozen=True)
class Compared:
    """What XLA says of the two programs of a pass: ratios, and whether they are the same."""

    flops: float
    bytes: float
    program: str

    @classmethod
    def of(cls, ours: Any, by_hand: Any) -> Compared:
        a, b = cost_of(ours), cost_of(by_hand)
        flops = a.flops / b.flops if b.flops > 0 else 1.0
        return cls(flops, a.bytes_accessed / b.bytes_accessed, _verdict(ours, by_hand))


def _verdict(ours: Any, by_hand: Any) -> str:
    if instructions(ours) == instructions(by_hand):
        return "same"
    return "same operations" if operations(ours) == operations(by_hand) else "differs"


@dataclass(frozen=True)
class Result:
    """One pass of one layer: time, operations and bytes, all as ratios to the program by hand."""

    layer: str
    which: str
    time: float
    quartiles: tuple[float, float]
    microseconds: float
    compared: Compared


def figures(of: Case, sizes: dict[str, int]) -> dict[str, tuple[Any, Any]]:
    """XLA's figures for both programs of each pass, before it optimizes; nothing is compiled."""
    built = programs(of, sizes, lambda fn: functools.partial(jax.eval_shape, fn))
    return {
        which: (
            cost_before(built.ours[which].lower(*built.arguments)),
            cost_before(built.by_hand[which].lower(*built.arguments)),
        )
        for which in built.ours
    }


def cost_before(lowered: Any) -> tuple[float, float]:
    analysis = lowered.cost_analysis()
    return analysis.get("flops", 0.0), analysis.get("transcendentals", 0.0)


def measure(of: Case, rounds: int, sizes: dict[str, int] = SIZES) -> list[Result]:
    """Both passes of a layer; raises where the two programs give different numbers."""
    built, found = programs(of, sizes), []
    for which, pair in compiled_pairs(built).items():
        check(*[compiled(*built.arguments) for compiled in pair.values()])
        taken = in_turn(
            {name: repeated(compiled, built.arguments) for name, compiled in pair.items()},
            rounds,
            wall_time,
        )
        found.append(
            Result(
                of.name,
                which,
                taken.ratio("ours", "by hand"),
                taken.spread("ours", "by hand"),
                taken.median("by hand") * 1e6 / REPEATS,
                Compared.of(*pair.values()),
            )
        )
    return found


def compiled_pairs(built: Programs) -> dict[str, dict[str, Any]]:
    """Both programs of each pass, compiled."""
    return {
        which: {
            "ours": built.ours[which].lower(*built.arguments).compile(),
            "by hand": built.by_hand[which].lower(*built.arguments).compile(),
        }
        for which in built.ours
    }


def compared_again(before: Sequence[Result]) -> list[Result]:
    """The results of a run, with the programs of today compared."""
    found = {
        (of.name, which): Compared.of(*pair.values())
        for of in CASES
        for which, pair in compiled_pairs(programs(of, SIZES)).items()
    }
    return [replace(r, compared=found[r.layer, r.which]) for r in before]


REPEATS = 10


def repeated(compiled: Any, arguments: tuple[Any, Inputs, Any]) -> Callable[[], object]:
    def run() -> object:
        for _ in range(REPEATS):
            y = compiled(*arguments)
        return jax.block_until_ready(y)

    return run


def wall_time(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def check(ours: Any, hand: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(hand), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def markdown(results: Sequence[Result]) -> str:
    """The results as a Markdown table.

    >>> compared = Compared(1.0, 1.0, "same")
    >>> print(markdown([Result("Dense", "forward", 1.0, (0.98, 1.03), 52.0, compared)]))
    | layer | pass | by hand | time | quartiles | flops | bytes | program |
    |---|---|---|---|---|---|---|---|
    | Dense | forward | 52 us | 1.00 | 0.98-1.03 | 1.000 | 1.000 | same |
    """
    columns = "layer", "pass", "by hand", "time", "quartiles", "flops", "bytes", "program"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in results:
        (low, high), c = r.quartiles, r.compared
        lines.append(
            f"| {r.layer} | {r.which} | {r.microseconds:.0f} us | {r.time:.2f} "
            f"| {low:.2f}-{high:.2f} | {c.flops:.3f} | {c.bytes:.3f} | {c.program} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What compiled layers cost, beside plain JAX.")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", help="one layer; writes nothing")
    parser.add_argument("--programs", action="store_true", help="compare programs, time nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the result")
    args = parser.parse_args()
    if args.programs:
        content = json.loads(args.out.read_text(encoding="utf-8"))
        write(compared_again([read(row) for row in content["rows"]]), content, args.out)
        return
    before = machine()
    chosen = [c for c in CASES if args.only in (None, c.name)]
    results = [result for of in chosen for result in measure(of, args.rounds)]
    print(markdown(results))
    if args.only is None:
        command = shlex.join(["python", "benchmarks/layers.py", *sys.argv[1:]])
        content = {"command": command, "machine": before, "load after": os.getloadavg()}
        write(results, {**content, "sizes": SIZES}, args.out)


def read(row: dict[str, Any]) -> Result:
    """A result from its JSON."""
    return Result(**{**row, "compared": Compared(**row["compared"])})


def write(results: Sequence[Result], content: dict[str, Any], path: Path) -> None:
    """Writes the results, the command and the machine as JSON, and beside it as Markdown."""
    content = {**content, "rows": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    sizes = ", ".join(f"{name} {value}" for name, value in content["sizes"].items())
    head = f"`{content['command']}`\n\n{facts}, load average afterwards {content['load after']}"
    text = f"{head}\n\nSizes: {sizes}.\n\n{markdown(results)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
