"""Meshes out of spec strings: what they are, and what every mistake is answered with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from shardflax.partitioning import (
    MeshSpecError,
    UnknownAxisError,
    make_abstract_mesh,
    make_mesh,
)
from shardflax.partitioning.grid import device_grid
from shardflax.partitioning.mesh_spec import parse_mesh_spec


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("data=8", {"data": 8}),
        ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}),
        ("tensor=2, fsdp=4", {"fsdp": 4, "tensor": 2}),
        ("data=2,fsdp=2,tensor=-1", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("model=2,data=-1", {"data": 4, "model": 2}),
        ("rows=2,cols=4", {"rows": 2, "cols": 4}),
        ("data=8,tensor=1", {"data": 8, "tensor": 1}),
        ("ici(fsdp=8)", {"fsdp": 8}),
        ("dcn(data=2) ici(fsdp=2,tensor=2)", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("dcn(data=-1), ici(fsdp=4)", {"data": 2, "fsdp": 4}),
        ("dcn(data=2) ici(data=2,tensor=-1)", {"data": 4, "tensor": 2}),
        ({"fsdp": -1, "data": 2}, {"data": 2, "fsdp": 4}),
    ],
)
def test_shapes_and_order(spec: Any, shape: dict[str, int]) -> None:
    mesh = make_mesh(spec)
    assert dict(mesh.shape) == shape
    assert mesh.axis_names == tuple(shape)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_known_axes_come_slowest_network_first_and_others_after_them() -> None:
    order = ("data", "stage", "fsdp", "fsdp2", "expert", "context", "tensor")
    for written in itertools.islice(itertools.permutations((*order, "rows")), 0, None, 997):
        spec = ",".join(f"{axis}=1" for axis in written)
        assert make_abstract_mesh(spec).axis_names == (*order, "rows")


def test_slices_are_runs_of_devices() -> None:
    """Across `data` of the DCN the devices are in different runs, inside it in one."""
    mesh = make_mesh("dcn(data=2) ici(data=2,tensor=2)")
    ids = [[device.id for device in row] for row in mesh.devices]
    assert ids == [[0, 1], [2, 3], [4, 5], [6, 7]]
    mesh = make_mesh("dcn(fsdp=2) ici(data=2,fsdp=2)")
    ids = [[device.id for device in row] for row in mesh.devices]
    assert ids == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_axis_types() -> None:
    assert set(make_mesh("data=8", axis_types="explicit").axis_types) == {AxisType.Explicit}
    mesh = make_mesh("data=4,tensor=2", axis_types={"tensor": "explicit"})
    assert mesh.axis_types == (AxisType.Auto, AxisType.Explicit)
    with pytest.raises(MeshSpecError, match="no axis type 'explict': did you mean 'explicit'"):
        make_mesh("data=8", axis_types="explict")
    with pytest.raises(MeshSpecError, match="no axis 'tensr': did you mean 'tensor'"):
        make_mesh("data=4,tensor=2", axis_types={"tensr": "auto"})


def test_fewer_devices() -> None:
    assert make_mesh("data=-1", jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("fsdp", r"cannot read 'fsdp'. Write 'fsdp=4,tensor=2'"),
        ("", "cannot read ''"),
        ("fsdp=4;tensor=2", "cannot read"),
        ("dcn(data=2) fsdp=4", "cannot read 'fsdp=4'"),
        ("dcn(data=2) dcn(fsdp=4)", r"dcn\(...\) stands twice"),
        ("fsdp=4,fsdp=2", "'fsdp' stands twice"),
        ("fsdp=0", "fsdp=0 is no size"),
        ("fsdp=-1,data=-1", "only one axis of a network can be -1"),
        ("fsdp=3,tensor=2", "needs 6 devices, and there are 8. Write fsdp=4, or -1 for one"),
        ("fsdp=4,tensor=4", "needs 16 devices, and there are 8. Write fsdp=2 or tensor=2, or -1"),
        ("fsdp=2,tensor=2", r"needs 4 devices, and there are 8. Write fsdp=4 or tensor=4, or -1 "
         r"for one of the axes \(what is left\), or pass devices=jax.devices\(\)\[:4\]"),
        ("fsdp=3,tensor=-1", "multiply to 3, which does not divide the 8 devices"),
        ("fsdp=16,tensor=-1", "multiply to 16, which does not divide the 8 devices"),
        ("dcn(data=-1) ici(fsdp=-1)", "nothing says how many slices there are"),
        ("dcn(tensor=2) ici(fsdp=4)", r"'tensor' across slices .* across_dcn=\('tensor',\)"),
        ("dcn(context=-1) ici(fsdp=4)", "'context' across slices"),
    ],
)  # fmt: skip
def test_mistakes(spec: str, text: str) -> None:
    with pytest.raises(MeshSpecError, match=text):
        make_mesh(spec)


def test_misspelt_axis_and_how_to_insist() -> None:
    with pytest.raises(UnknownAxisError, match=r"did you mean 'fsdp'\?.*other_axes=\('fspd',\)"):
        make_mesh("fspd=8")
    assert make_mesh("fspd=8", other_axes=("fspd",)).axis_names == ("fspd",)


def test_tensor_across_slices_when_asked_for_by_name() -> None:
    mesh = make_mesh("dcn(tensor=2) ici(fsdp=4)", across_dcn=("tensor",))
    assert dict(mesh.shape) == {"fsdp": 4, "tensor": 2}


@dataclass(frozen=True)
class FakeTpu:
    """A TPU device as `mesh_utils` looks at it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "fake"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return (self.id % 2, self.id // 2 % 2, 0)


def test_slices_of_hardware_are_counted() -> None:
    devices = [FakeTpu(i, i // 4, i // 4) for i in range(8)]
    spec = parse_mesh_spec("dcn(data=-1) ici(fsdp=-1)").fill(8, 2)
    assert (spec.dcn, spec.ici) == ((2, 1), (1, 4))
    with pytest.raises(
        MeshSpecError, match=r"in 2 slices, and dcn\(...\) multiplies to 4. Write dcn\(data=2\)"
    ):
        make_mesh("dcn(data=4) ici(fsdp=2)", devices)
    with pytest.raises(
        MeshSpecError, match=r"in 2 slices, and no axis is .* Write 'dcn\(data=2\) ici\(fsdp=4\)'"
    ):
        make_mesh("fsdp=8", devices)


def test_hardware_slices_make_a_hybrid_grid() -> None:
    """On devices with slices the grid is `mesh_utils`' own hybrid mesh."""
    devices = [FakeTpu(i, i // 4, i // 4) for i in range(8)]
    spec = parse_mesh_spec("dcn(data=2) ici(fsdp=2,tensor=2)").fill(8, 2)
    grid = device_grid(spec, devices)
    assert grid.shape == (2, 2, 2)
    assert [{d.slice_index for d in block.flat} for block in grid] == [{0}, {1}]
