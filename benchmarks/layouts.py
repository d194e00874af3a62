"""What layouts cost: resolving, explaining, refusing, initialising, and in compiled programs.

    python benchmarks/layouts.py

Prints the table and writes it, with the command that gave it, to `benchmarks/results/layouts.json`
and `.md`.  Times are of the processor, so that other work on the machine counts little, and those
of a process by the clock; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json
import re
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import misspelt
from benchmarks.report import Row, machine, markdown, write
from benchmarks.timing import cpu_time
from shardflax.core.boxes import unbox
from shardflax.partitioning import (
    Layout,
    LayoutError,
    LogicallyPartitioned,
    constrain,
    explain,
    init_sharded,
    make_mesh,
    named,
    plan_init,
    preset,
    use,
)

RESULTS = Path(__file__).parent / "results" / "layouts.json"
INITS = jax.nn.initializers
KERNELS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "attention/query": (("embed", "heads", "head_dim"), (512, 8, 64)),
    "attention/key": (("embed", "kv_heads", "head_dim"), (512, 8, 64)),
    "attention/value": (("embed", "kv_heads", "head_dim"), (512, 8, 64)),
    "attention/out": (("heads", "head_dim", "embed"), (8, 64, 512)),
    "mlp/gate": (("embed", "mlp"), (512, 2048)),
    "mlp/up": (("embed", "mlp"), (512, 2048)),
    "mlp/down": (("mlp", "embed"), (2048, 512)),
    "attention_norm": (("norm",), (512,)),
    "mlp_norm": (("norm",), (512,)),
}


def shapes(layers: int) -> Any:
    """The AdamW train state of a decoder, as boxed shapes: 27 leaves a layer, and two more."""

    def box(names: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        return LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    params = {
        f"layers_{i}": {name: {"kernel": box(*kernel)} for name, kernel in KERNELS.items()}
        for i in range(layers)
    }
    opt_state = jax.eval_shape(optax.adamw(1e-3).init, unbox(params))
    return {"params": params, "opt_state": opt_state, "step": jax.ShapeDtypeStruct((), jnp.int32)}


def resolving(rounds: int) -> Row:
    """Milliseconds to resolve and explain a state of 2,000 leaves, warm."""
    mesh, rules, state = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp"), shapes(74)

    def once() -> None:
        assert len(explain(state, mesh, rules).leaves) == 2000

    once()
    both = [cpu_time(once) * 1e3 for _ in range(rounds)]
    alone = [cpu_time(lambda: Layout(state, mesh, rules)) * 1e3 for _ in range(rounds)]
    detail = {"leaves": 2000, "all ms": both, "resolving alone, ms": statistics.median(alone)}
    what = "resolve and explain a state of 2,000 leaves, warm"
    return Row(what, 50, round(statistics.median(both), 1), unit="ms", detail=detail)


def layers(key: jax.Array, count: int, width: int) -> Any:
    """Kernels and scales of equal layers."""

    def kernel(i: int) -> Any:
        init = named(INITS.lecun_normal(), ("embed", "mlp"))
        return init(jax.random.fold_in(key, i), (width, width))

    scale = named(INITS.ones, ("norm",))
    return {
        f"layer_{i}": {"kernel": kernel(i), "scale": scale(key, (width,))} for i in range(count)
    }


def refusing(rounds: int) -> list[Row]:
    """Seconds until a misspelt name in a model of 200 parameters is refused, from cold."""
    mesh, rules, key = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp"), jax.random.key(0)
    model, x = misspelt.model()

    def refused(call: Callable[[], Any]) -> None:
        try:
            call()
        except LayoutError:
            return
        raise AssertionError("not refused")

    def made() -> Any:
        return init_sharded(
            lambda key: model.init(key, jnp.zeros(x.shape)), key, mesh=mesh, rules=rules
        )

    rows = list[Row]()
    for what, call in (
        ("init_sharded", made),
        ("explain", lambda: explain(model, mesh, rules, x).check()),
    ):
        times = [cpu_time(lambda call=call: refused(call)) for _ in range(rounds)]
        text = f"`{what}` refuses a misspelt name in one of 200 parameters, first call"
        rows.append(Row(text, 1.0, round(times[0], 3), unit="s", detail={"all s": times}))
    return rows


# What a process of `shardflax explain` does, with the times of its parts on standard error.
COMMAND = """
import json, sys, time
times = [time.perf_counter()]
import jax
times.append(time.perf_counter())
import benchmarks.misspelt, shardflax.cli.explain
times.append(time.perf_counter())
status = shardflax.cli.main(sys.argv[1:])
times.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(times, times[1:])]), file=sys.stderr)
sys.exit(status)
"""


def command(rounds: int) -> list[Row]:
    """The same on the command line, by the clock: the whole process, and what is ours of it.

    The quickest of the rounds counts: what else runs on the machine only ever adds.
    """
    arguments = ["explain", "benchmarks.misspelt:model", "--mesh", "fsdp=4,tensor=2"]
    arguments.append("--problems-only")
    whole, parts = list[float](), list[list[float]]()
    for _ in range(rounds):
        for how in (["-m", "shardflax"], ["-c", COMMAND]):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *how, *arguments], capture_output=True, text=True
            )
            seconds = time.perf_counter() - start
            assert done.returncode == 1 and "did you mean 'embed'?" in done.stdout, done.stderr
            if done.stderr:
                parts.append(json.loads(done.stderr))
            else:
                whole.append(seconds)
    jax_alone, ours, refusing = map(min, zip(*parts, strict=True))
    detail = {
        "import jax, s": jax_alone,
        "import of the command, s": ours,
        "whole process, s": whole,
        "refusing, s": [times[-1] for times in parts],
    }
    what = "`shardflax explain` refuses it, once all is imported, by the clock"
    process = f"the whole process of it, of which `import jax` takes {jax_alone:.2f} s"
    return [
        Row(what, 1.0, round(refusing, 3), unit="s", detail=detail),
        Row(process, 3.0, round(min(whole), 3), unit="s"),
    ]


def block(x: jax.Array, params: Any, put: Callable[[jax.Array, tuple[str, ...]], jax.Array]) -> Any:
    """A gated layer with constraints on everything between its products."""
    x = put(x, ("batch", "norm_length", "act_embed"))
    gate = put(x @ params["gate"], ("batch", "length", "act_mlp"))
    up = put(x @ params["up"], ("batch", "length", "act_mlp"))
    return put((jax.nn.silu(gate) * up) @ params["down"], ("batch", "norm_length", "act_embed"))


def lowering() -> Row:
    """Instructions that constraints by name add to a program, beside the same by hand."""
    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), preset("fsdp_tp")
    by_hand = {
        ("batch", "norm_length", "act_embed"): jax.P(("data", "fsdp"), "tensor"),
        ("batch", "length", "act_mlp"): jax.P(("data", "fsdp"), None, "tensor"),
    }

    def put(x: jax.Array, names: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, by_hand[names]))

    weights = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    params = {name: jnp.ones((4, *shape)) for name, shape in weights.items()}

    def program(put: Any) -> str:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            y, _ = jax.lax.scan(lambda x, p: (x + block(x, p, put), None), x, params)
            return (y**2).mean()

        with use(mesh, rules):
            lowered = jax.jit(jax.grad(loss)).lower(params, jnp.ones((8, 16, 64)))
            return lowered.compile().as_text() or ""

    ours, theirs = bare(program(constrain)), bare(program(put))
    added = abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs, strict=False))
    detail = {"instructions": len(theirs), "same text": ours == theirs}
    what = "lines of a compiled program that differ from constraints by hand"
    return Row(what, 0, added, unit="lines", detail=detail)


def bare(text: str) -> list[str]:
    """The lines of a program, without what says where in the source they come from."""
    tables = re.compile(r"\d+ [\"{]|FileNames|FunctionNames|FileLocations|StackFrames|HloModule")
    lines = re.sub(r", metadata={[^}]*}", "", text).splitlines()
    return [line for line in lines if line.strip() and not tables.match(line)]


def memory() -> list[Row]:
    """Peak memory of an init over the state's own, measured in a process of its own."""
    made = subprocess.run(
        [sys.executable, __file__, "--init"], capture_output=True, text=True, check=True
    )
    peak, state, temporary, programs, steps = map(int, made.stdout.split())
    detail = {
        "state, bytes": state,
        "largest initialiser, bytes": temporary,
        "resident growth at its peak, bytes": peak,
    }
    what = "peak memory of an init, over its state and its largest initialiser"
    ratio = round(peak / (state + temporary), 3)
    programs_row = Row(
        "programs compiled for 64 equal layers of 2 parameters",
        2,
        programs,
        unit="programs",
        detail={"runs": steps},
    )
    return [Row(what, 1.1, ratio, detail=detail), programs_row]


def peak_of_init() -> None:
    """Prints what `memory` reads; sizes are sums over the eight devices, which share the memory."""
    mesh, rules, key = make_mesh("fsdp=4,tensor=2"), preset("fsdp_tp"), jax.random.key(0)
    plan = plan_init(lambda key: layers(key, 64, 2048), key, mesh=mesh, rules=rules)
    compiled = [one.memory_analysis() for one in plan.compiled()]
    small = plan_init(lambda key: layers(key, 1, 64), key, mesh=mesh, rules=rules)
    small.run(progress=False)
    seen = [resident()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    state = plan.run(progress=False)
    done.set()
    watcher.join()
    sizes = [x.nbytes for x in jax.tree.leaves(state)]
    held = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
    assert sum(sizes) <= held
    temporary = 8 * max(one.temp_size_in_bytes for one in compiled)
    print(max(seen) - seen[0], held, temporary, plan.programs, plan.steps)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description="What layouts cost.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--init", action="store_true", help="measure one init; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the result")
    args = parser.parse_args()
    if args.init:
        peak_of_init()
        return
    before = machine()
    rows = [*refusing(3), *command(5), resolving(args.rounds), lowering(), *memory()]
    print(markdown(rows))
    write(rows, shlex.join(["python", "benchmarks/layouts.py", *sys.argv[1:]]), before, args.out)


if __name__ == "__main__":
    main()
