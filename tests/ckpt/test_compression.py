"""Compression by choice: smaller, checked, read by Orbax, and restored under any layout."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shardflax import ckpt


def laid_out(*spec: str | None) -> dict[str, Any]:
    """A large array that is sharded, of values that compress, and small ones."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    values = (np.arange(600 * 1024) % 97).astype(np.float32).reshape(600, 1024)
    half = jnp.asarray(values % 7, jnp.bfloat16)
    return {
        "large": jax.device_put(values, sharding),
        "half": jax.device_put(half, sharding),
        "small": np.arange(5),
        "step": 3,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with ckpt.CheckpointManager(folder, compression="zstd") as manager:
        manager.save(1, laid_out("a", "b"))
    return folder


def test_smaller_and_restored_under_another_layout(run: Path) -> None:
    info = ckpt.inspect_checkpoint(run)
    assert info.bytes_on_disk < 0.3 * info.nbytes
    want = laid_out(None, ("b", "a"))  # type: ignore[arg-type]
    got = ckpt.load_checkpoint(run / "1", want).state
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    assert got["large"].sharding == want["large"].sharding
    assert ckpt.verify_checkpoint(run).ok


def test_orbax_reads_it(run: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(run / "1/state")
    for name in ("large", "half", "small"):
        np.testing.assert_array_equal(got[name], laid_out("a")[name])


def test_every_bit_counts(run: Path) -> None:
    """Flipped bits are found by the checksums, before anything is decompressed."""
    path = max((run / "1/state/d").iterdir(), key=lambda p: p.stat().st_size)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    want = laid_out("a", "b")
    try:
        for at in rng.integers(len(content), size=12):
            path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
            with pytest.raises(ckpt.CheckpointReadError, match=r"large|half"):
                ckpt.load_checkpoint(run / "1", want)
            assert not ckpt.verify_checkpoint(run).ok
    finally:
        path.write_bytes(content)


def test_what_nobody_knows_is_refused(run: Path, tmp_path: Path) -> None:
    wrong: Any = "lzma"
    with pytest.raises(ValueError, match="'zstd' or None, not 'lzma'"):
        ckpt.CheckpointManager(tmp_path, compression=wrong)
    from shardflax.ckpt.durable import checksum
    from shardflax.ckpt.manifest import Manifest

    text = (run / "1/MANIFEST.json").read_bytes()
    rest = text.partition(b"\n")[2].replace(b'"codec": "zstd"', b'"codec": "lzma"')
    with pytest.raises(ValueError, match="compressed by 'lzma'"):
        Manifest.read(b'{"crc32": "' + checksum(rest).encode() + b'", "body":\n' + rest)
