"""Whether code makes arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def nothing_allocated() -> Iterator[None]:
    """Fails if there are arrays after the block that were not there before.

    Those of before are held: the collector may let go of some of them at any time.
    """
    before = jax.live_arrays()
    yield
    known = {id(array) for array in before}
    assert not [array for array in jax.live_arrays() if id(array) not in known]
