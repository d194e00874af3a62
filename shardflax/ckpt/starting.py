"""Handing a state over to the writer of a save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from shardflax.ckpt.handle import SaveHandle
from shardflax.ckpt.paths import Path as LeafPath
from shardflax.ckpt.plan import Plan
from shardflax.ckpt.saving import Save
from shardflax.ckpt.staging import Staged, stage
from shardflax.ckpt.worker import Worker

__all__ = ["hand_over", "python_values"]


def hand_over(
    job: Save,
    leaves: Sequence[Any],
    handle: SaveHandle,
    syncer: Worker,
    begin: Callable[[], object],
) -> None:
    """Stages a state, parcel by parcel, and lets the writer begin; raises what went wrong.

    The writer begins when all is staged, or when that must wait for it: it would take this
    thread's time.
    """
    begun = False
    staged: list[Staged] = []
    try:
        for parcel, size in zip(job.plan.parcels, job.plan.sizes, strict=True):
            if not begun and not job.budget.fits(size):
                begun = True
                begin()
            job.budget.take(size)
            group = stage(parcel, leaves)
            job.groups.put(group)
            staged += [x for x in group if x.moving]
        job.groups.put(None)
    except BaseException as error:
        job.groups.put(error)
        raise
    finally:
        if not begun:
            begin()
    if staged:
        _when_ready(syncer, staged, handle.staged)
    else:
        handle.staged.set_result(None)


def python_values(plan: Plan, leaves: Sequence[Any]) -> dict[LeafPath, Any]:
    """The leaves that are not arrays, by path.

    >>> import jax
    >>> from shardflax.ckpt.plan import make_plan
    >>> python_values(*make_plan({"a": 3, "b": jax.numpy.ones(2)}))
    {('a',): 3}
    """
    return {
        path: leaf
        for path, leaf in zip(plan.tree.paths, leaves, strict=True)
        if isinstance(leaf, bool | int | float | complex | str) and not hasattr(leaf, "dtype")
    }


def _when_ready(worker: Worker, staged: list[Staged], future: Future[None]) -> None:
    """Completes a future when the transfers are done."""

    def wait() -> None:
        try:
            for value in staged:
                value.ready()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    worker.submit(wait)
