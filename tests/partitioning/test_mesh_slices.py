"""Slices, real and faked: grids that respect them, and who is told what is DCN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from shardflax.partitioning import (
    MeshSpecError,
    UnknownAxisError,
    collectives,
    fake_slices,
    make_abstract_mesh,
    make_mesh,
    networks,
    slices_of,
)
from shardflax.partitioning.grid import device_grid
from shardflax.partitioning.mesh_spec import parse_mesh_spec


@dataclass(frozen=True)
class Fake:
    """A device as JAX and `mesh_utils` look at it."""

    id: int
    platform: str = "tpu"
    process_index: int = 0
    slice_index: int | None = None
    side: int = 4
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        at = self.id % self.side**2
        return (at % self.side, at // self.side, 0)


def tpus(slices: int = 1, side: int = 4) -> list[Any]:
    """Slices of `side` x `side` chips each."""
    size = side * side
    return [Fake(i, slice_index=i // size, side=side) for i in range(slices * size)]


def gpus(processes: int, each: int) -> list[Any]:
    return [Fake(i, "gpu", i // each, device_kind="H100") for i in range(processes * each)]


def ids(mesh: Any) -> list[int]:
    return [device.id for device in mesh.devices.flat]


def test_one_slice_is_ordered_by_jax() -> None:
    devices = tpus()
    mesh = make_mesh("fsdp=8,tensor=2", devices)
    expected = mesh_utils.create_device_mesh((8, 2), devices, allow_split_physical_axes=True)
    assert ids(mesh) == [device.id for device in expected.flat] != list(range(16))
    mesh = make_mesh("fsdp=4,tensor=4", devices)
    assert ids(mesh) == [d.id for d in mesh_utils.create_device_mesh((4, 4), devices).flat]


def test_splits_are_refused_where_they_are_not_allowed() -> None:
    make_mesh("fsdp=4,tensor=4", tpus(), allow_split_physical_axes=False)
    with pytest.raises(MeshSpecError, match=r"no products of the physical axes of these 16 dev"):
        make_mesh("fsdp=8,tensor=2", tpus(), allow_split_physical_axes=False)
    with pytest.raises(MeshSpecError, match=r"say allow_split_physical_axes=True"):
        make_mesh("dcn(data=2) ici(fsdp=8,tensor=2)", tpus(2), allow_split_physical_axes=False)


def test_a_part_of_a_slice() -> None:
    """A block of devices is a mesh; a block with holes has no physical order."""
    devices = tpus()
    corner = [d for d in devices if d.coords[0] < 2 and d.coords[1] < 2]
    assert make_mesh("tensor=4", corner).size == 4
    for part in (devices[:3] + devices[4:5], [devices[0], devices[15]]):
        with pytest.raises(MeshSpecError, match=r"no physical order of these \d .*a box without"):
            make_mesh("tensor=-1", part)
    with pytest.raises(MeshSpecError, match="devices is empty"):
        make_mesh("tensor=-1", [])


@pytest.mark.parametrize(
    ("spec", "across"),
    [
        ("dcn(data=2) ici(fsdp=4,tensor=4)", {"data": (2, 1), "fsdp": (1, 4), "tensor": (1, 4)}),
        ("dcn(data=-1) ici(data=4,fsdp=-1)", {"data": (2, 4), "fsdp": (1, 4)}),
        ("dcn(fsdp=2) ici(data=4,fsdp=4)", {"data": (1, 4), "fsdp": (2, 4)}),
    ],
)
def test_slices_of_hardware(spec: str, across: Any) -> None:
    mesh = make_mesh(spec, tpus(2))
    assert networks(mesh) == across
    assert np.array_equal(slices_of(mesh).ravel(), [d.slice_index for d in mesh.devices.flat])


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("fsdp=32", r"32 devices are in 2 slices, and no axis is across slices. Write "
         r"'dcn\(data=2\) ici\(fsdp=16\)' or 'dcn\(fsdp=2\) ici\(fsdp=16\)'\."),
        ("tensor=32", r"Write 'dcn\(data=2\) ici\(tensor=16\)'\."),
        ("data=2,tensor=16", r"Write 'dcn\(data=2\) ici\(tensor=16\)'\."),
        ("a=1,b=-1", r"Write 'dcn\(data=2\) ici\(b=16\)' or 'dcn\(b=2\) ici\(b=16\)'\."),
        ("dcn(data=4) ici(fsdp=8)", r"and dcn\(...\) multiplies to 4. Write dcn\(data=2\)\."),
        ("dcn(data=2) ici(fsdp=4)", r"needs 8 devices, and there are 32. Write ici\(fsdp=16\), or"),
        ("dcn(data=2) ici(fsdp=-1,tensor=3)", r"Write ici\(tensor=2\) or ici\(tensor=4\)\."),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_slices_is_answered(spec: str, text: str) -> None:
    with pytest.raises(MeshSpecError, match=text):
        make_mesh(spec, tpus(2))


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_every_axis_is_cut_as_its_spec_says(slices: int) -> None:
    """Whatever the sizes, on hardware and emulated; each device is in the mesh once."""
    axes = ("data", "fsdp", "rows")
    chips, emulated = tpus(slices), [Fake(i, "cpu") for i in range(16 * slices)]
    for dcn in itertools.product((1, 2, 4), repeat=3):
        for ici in itertools.product((1, 2, 4, 8, 16), repeat=3):
            if math.prod(dcn) != slices or math.prod(ici) != 16:
                continue
            across, inside = (
                ",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))
                for sizes in (dcn, ici)
            )
            mesh = make_mesh(f"dcn({across}) ici({inside})", chips)
            said = dict(zip(axes, zip(dcn, ici, strict=True), strict=True))
            assert networks(mesh) == said
            assert sorted(ids(mesh)) == list(range(16 * slices))
            assert networks(make_mesh(f"dcn({across}) ici({inside})", emulated)) == said


def test_one_slice_has_nothing_across() -> None:
    with pytest.raises(MeshSpecError, match=r"in one slice, and dcn\(...\) multiplies to 2. Put"):
        make_mesh("dcn(data=2) ici(fsdp=8)", tpus())


def test_processes_are_slices_where_nothing_else_is() -> None:
    """Without slices of their own, devices are cut as JAX does it by processes."""
    devices = gpus(2, 4)
    mesh = make_mesh("dcn(data=-1) ici(fsdp=-1,tensor=2)", devices[::-1])
    expected = mesh_utils.create_hybrid_device_mesh(
        (1, 2, 2), (2, 1, 1), devices, process_is_granule=True
    )
    assert ids(mesh) == [device.id for device in expected.flat]
    assert networks(mesh) == {"data": (2, 1), "fsdp": (1, 2), "tensor": (1, 2)}
    assert networks(make_mesh("data=2,fsdp=2,tensor=2", devices))["data"] == (1, 2)
    assert networks(make_mesh("dcn(data=2) ici(fsdp=4)", gpus(4, 2)))["data"] == (2, 1)
    assert networks(make_mesh("dcn(data=4) ici(fsdp=2)", gpus(2, 4)))["data"] == (4, 1)
    with pytest.raises(MeshSpecError, match=r"multiplies to 2, and the devices are in 3 processes"):
        make_mesh("dcn(data=2) ici(fsdp=3)", gpus(3, 2))


def test_gpus_that_know_their_slices_are_cut_so() -> None:
    devices: list[Any] = [Fake(i, "gpu", i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh("dcn(data=-1) ici(fsdp=-1)", devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert slices_of(mesh).tolist() == [[0] * 4, [1] * 4]


@pytest.fixture
def two() -> Iterator[Any]:
    with fake_slices(2) as slices:
        yield slices


def test_fake_slices_are_as_strict_as_hardware(two: Any) -> None:
    assert [[d.id for d in one] for one in two] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    mesh = make_mesh("dcn(data=-1) ici(fsdp=-1)")
    assert networks(mesh) == {"data": (2, 1), "fsdp": (1, 4)}
    with pytest.raises(MeshSpecError, match=r"Write 'dcn\(data=2\) ici\(fsdp=4\)'"):
        make_mesh("fsdp=8")
    assert networks(make_mesh("fsdp=4", two[1])) == {"fsdp": (1, 4)}
    with fake_slices(4):
        assert dict(make_mesh("dcn(data=-1) ici(fsdp=2)").shape) == {"data": 4, "fsdp": 2}
    assert len(np.unique(slices_of(mesh))) == 2


def test_fake_slices_end_with_their_block() -> None:
    mesh = make_mesh("data=8")
    with fake_slices(4):
        assert networks(mesh) == {"data": (4, 2)}
    assert networks(mesh) == {"data": (1, 8)}
    for count in (3, 0, 16):
        with pytest.raises(MeshSpecError, match="8 devices are no"), fake_slices(count):
            raise AssertionError("not reached")


def test_an_axis_cut_into_unequal_parts_counts_as_dcn() -> None:
    with fake_slices(2) as (one, other):
        mesh = jax.sharding.Mesh(np.array([*one[:3], *other]), ("data",))
        assert networks(mesh) == {"data": (7, 1)}


def sent(mesh: Any) -> dict[tuple[str, ...], str]:
    """The network of each collective of a program that sums over one axis, and over both."""

    def body(x: Any) -> Any:
        return jax.lax.psum(x, "data"), jax.lax.psum(x, "fsdp"), jax.lax.psum(x, ("data", "fsdp"))

    spec = P("data", "fsdp")
    whole = jax.shard_map(
        body, mesh=mesh, in_specs=spec, out_specs=(P(None, "fsdp"), P("data"), P())
    )
    x = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, spec))
    return {c.axes: c.network for c in collectives(jax.jit(whole).lower(x).compile())}


def test_communication_and_mesh_agree() -> None:
    """ICI and DCN: by the spec on emulated devices, and by `fake_slices`, which wins."""
    both = ("data", "fsdp")
    said = sent(make_mesh("dcn(data=2) ici(fsdp=4)"))
    assert said == {("data",): "DCN", ("fsdp",): "ICI", both: "DCN"}
    assert set(sent(make_mesh("data=2,fsdp=4")).values()) == {"ICI"}
    with fake_slices(4):
        assert set(sent(make_mesh("dcn(data=2,fsdp=2) ici(fsdp=2)")).values()) == {"DCN"}


HOST = (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-gather.9_0",'
    '_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_GATHER"}'
)
ACROSS = """HloModule jit_step, is_scheduled=true, num_partitions=16

ENTRY %main.1 (p: bf16[128,512]) -> bf16[512,512] {
  %p = bf16[128,512]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[128,512]{1,0}, u32[], token[]) send(%p, %token), channel_id=2, $HOST
  %recv = (bf16[256,512]{1,0}, u32[], token[]) recv(%token), channel_id=1, $HOST
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %done = (bf16[256,512]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %got = bf16[256,512]{1,0} get-tuple-element(%done), index=0
  ROOT %all = bf16[512,512]{1,0} all-gather(%got), replica_groups=[4,4]<=[16], dimensions={0}
}
""".replace("$HOST", HOST)


@dataclass(frozen=True)
class Compiled:
    """A program that was compiled elsewhere."""

    text: str

    def as_text(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("spec", "inside", "across"),
    [
        ("dcn(data=2) ici(fsdp=4,tensor=4)", ("tensor",), ("data",)),
        ("dcn(fsdp=2) ici(data=4,fsdp=4)", ("fsdp",), ("fsdp",)),
        ("dcn(fsdp=2) ici(fsdp=2,expert=2,tensor=4)", ("tensor",), ("fsdp",)),
    ],
)
def test_a_program_for_several_slices_is_that_of_one(spec: str, inside: Any, across: Any) -> None:
    """As the TPU compiler writes it: devices of one slice, and the host for what leaves it."""
    found = collectives(Compiled(ACROSS), make_mesh(spec, tpus(2)))
    assert [(c.kind, c.axes, c.network, c.bytes, c.shape) for c in found] == [
        ("all-gather", inside, "ICI", 512 * 512 * 2, (512, 512)),
        ("all-gather", across, "DCN", 256 * 512 * 2, (256, 512)),
    ]
    text = ACROSS.replace("{1,2}x{0:15}", "{0},{1}x{0,3:5}").replace("ALL_GATHER", "ONE_TO_ONE")
    assert [c.kind for c in collectives(Compiled(text), make_mesh(spec, tpus(2)))][1] == (
        "collective-permute"
    )


def test_types_in_the_spec() -> None:
    auto, explicit, manual = (jax.sharding.AxisType[n] for n in ("Auto", "Explicit", "Manual"))
    mesh = make_mesh("data=2,fsdp=2:manual,tensor=2:explicit")
    assert mesh.axis_types == (auto, manual, explicit)
    mesh = make_mesh("dcn(data=2:explicit) ici(data=2,fsdp=2)", axis_types="manual")
    assert mesh.axis_types == (explicit, manual)
    mesh = make_mesh("data=4,fsdp=2", axis_types={"data": explicit})
    assert mesh.axis_types == (explicit, auto)
    assert make_mesh("data=8", axis_types=explicit).axis_types == (explicit,)
    with pytest.raises(MeshSpecError, match="no axis type 'explict': did you mean 'explicit'"):
        make_mesh("data=8:explict")
    with pytest.raises(MeshSpecError, match="'data' is auto and explicit"):
        make_mesh("dcn(data=2:explicit) ici(data=4:auto)")


@pytest.mark.parametrize(
    "spec",
    ["fsdp=4,tensor=2", "dcn(data=2) ici(data=2,fsdp=-1,tensor=2:explicit)", "dcn(data=2)",
     "dcn(data=2) ici(data=1,fsdp=4)"],
)  # fmt: skip
def test_a_spec_is_written_as_it_is_read(spec: str) -> None:
    read = parse_mesh_spec(spec)
    again = parse_mesh_spec(str(read))
    assert (again.axes, again.ici, again.dcn) == (read.axes, read.ici, read.dcn)


def test_abstract_meshes_are_those_of_the_spec() -> None:
    for spec in ("fsdp=4,tensor=2:explicit", "dcn(data=2) ici(data=2,fsdp=2)"):
        mesh, real = make_abstract_mesh(spec), make_mesh(spec)
        for what in ("axis_names", "axis_sizes", "axis_types"):
            assert getattr(mesh, what) == getattr(real, what)
    mesh = make_abstract_mesh("dcn(data=-1) ici(fsdp=-1,tensor=4)", 512, slices=2)
    assert mesh.axis_sizes == (2, 64, 4)
    with pytest.raises(MeshSpecError, match=r"-1 is what is left. Write the size, or make_abs"):
        make_abstract_mesh("fsdp=-1")
    with pytest.raises(MeshSpecError, match="needs 8 devices, and there are 512"):
        make_abstract_mesh("fsdp=8", 512)
    with pytest.raises(MeshSpecError, match="'tensor' across slices"):
        make_abstract_mesh("dcn(tensor=2) ici(fsdp=4)")
    with pytest.raises(UnknownAxisError, match="did you mean 'fsdp'"):
        make_abstract_mesh("fspd=8")


def test_the_grid_of_a_hybrid_mesh_is_mesh_utils_own() -> None:
    devices = tpus(2)
    spec = parse_mesh_spec("dcn(data=2) ici(data=2,fsdp=8)").fill(32, 2)
    expected = mesh_utils.create_hybrid_device_mesh(
        spec.ici, spec.dcn, devices, allow_split_physical_axes=True
    )
    assert np.array_equal(device_grid(spec, devices), expected)
