"""Pictures of meshes: what is where, at 8 devices and at 512."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

from shardflax.partitioning import fake_slices, make_abstract_mesh, make_mesh, mesh_picture


@dataclass(frozen=True)
class Chip:
    """A device with a place, a slice and a process."""

    id: int
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5e"

    @property
    def coords(self) -> tuple[int, int]:
        return (self.id // 4, self.id % 4)


def grid(shape: tuple[int, ...], axes: str, slices: int = 1, processes: int = 1) -> Mesh:
    count = int(np.prod(shape))
    chips = [Chip(i, i * slices // count, i * processes // count) for i in range(count)]
    return Mesh(np.array(chips, dtype=object).reshape(shape), tuple(axes.split()))


def lines(mesh: Any, *args: Any, **kwargs: Any) -> list[str]:
    return str(mesh_picture(mesh, *args, **kwargs)).splitlines()


def test_rows_columns_and_panels() -> None:
    assert lines(make_mesh("data=2,fsdp=2,tensor=2:explicit")) == [
        "data=2, fsdp=2, tensor=2 (explicit): 8 cpu devices",
        "",
        "data=0             data=1",
        "          tensor             tensor",
        "          0  1               0  1",
        "        ┌─────             ┌─────",
        "fsdp  0 │ 0  1     fsdp  0 │ 4  5",
        "      1 │ 2  3           1 │ 6  7",
    ]
    row = "0  1  2  3  4  5  6  7"
    assert lines(make_mesh("data=8"))[2:] == ["data", row, "─" * len(row), row]
    assert lines(make_mesh("data=1", jax.devices()[:1])) == ["data=1: 1 cpu device", "", "0"]


def test_axes_of_size_one_take_no_room() -> None:
    small = lines(make_mesh("fsdp=4,tensor=2"))
    large = lines(make_mesh("data=1,fsdp=4,expert=1,tensor=2"))
    assert small[1:] == large[1:] and "expert=1" in large[0]


def test_slices_are_panels_and_axes_say_their_network() -> None:
    with fake_slices(2):
        found = lines(make_mesh("dcn(fsdp=2) ici(data=2,fsdp=2)"))
    assert found == [
        "data=2 (ICI), fsdp=4 (DCN 2 x ICI 2): 8 cpu devices in 2 slices",
        "",
        "slice 0          slice 1",
        "          fsdp             fsdp",
        "          0  1             2  3",
        "        ┌─────           ┌─────",
        "data  0 │ 0  1   data  0 │ 4  5",
        "      1 │ 2  3         1 │ 6  7",
    ]
    assert lines(make_mesh("dcn(data=2) ici(fsdp=4)"))[2] == "slice 0: data=0   slice 1: data=1"


def test_slices_that_are_no_boxes_share_a_panel() -> None:
    chips: Any = [Chip(i, int(i in (0, 3))) for i in range(4)]
    mesh = Mesh(np.array(chips, dtype=object).reshape(2, 2), ("a", "b"))
    found = lines(mesh)
    assert "in 2 slices" in found[0] and found[-1].split() == ["1", "│", "2", "3"]


def test_large_meshes_stay_readable() -> None:
    whole = lines(grid((16, 16), "fsdp tensor"))
    assert len(whole) == 21 and max(map(len, whole)) <= 100 and whole[-1].endswith("255")
    found = lines(grid((2, 16, 16), "data fsdp tensor", slices=2))
    assert found[0].startswith("data=2 (DCN), fsdp=16 (ICI), tensor=16 (ICI): 512 TPU v5e devices")
    assert len(found) == 11 and max(map(len, found)) <= 100
    assert found[-1].split()[:7] == ["15", "│", "240", "241", "242", "…", "255"]
    many = lines(grid((8, 8, 2, 4), "data fsdp expert tensor"))
    assert any("… 60 more" in line for line in many) and "data=7, fsdp=7" in "\n".join(many)
    assert len(many) < 20
    assert len(lines(grid((16, 16), "a b"), limit=4)) == 10


def test_width_puts_panels_below_one_another() -> None:
    mesh = make_mesh("data=4,tensor=2")
    assert len(lines(make_mesh("data=2,fsdp=2,tensor=2"), width=30)) == 15
    assert lines(mesh, width=5) == lines(mesh)


def test_what_stands_for_a_device() -> None:
    mesh = grid((2, 4), "a b", processes=2)
    assert lines(mesh)[0].endswith("8 TPU v5e devices, 2 processes")
    assert lines(mesh, "process")[-1].split() == ["1", "│", "1", "1", "1", "1"]
    assert lines(mesh, "coords")[-1].split() == ["1", "│", "1,0", "1,1", "1,2", "1,3"]
    assert lines(make_mesh("data=8"), "coords")[-1].split()[-1] == "7"
    abstract = lines(make_abstract_mesh("fsdp=4,tensor=2"))
    assert "8 devices, none of them chosen" in abstract[0]
    assert abstract[1:] == lines(make_mesh("fsdp=4,tensor=2"))[1:]


@pytest.mark.parametrize("parts", [{"slices": 2}, {"processes": 2}])
def test_rich_shows_the_same_in_colours(parts: Any) -> None:
    picture = mesh_picture(grid((2, 2), "data fsdp", **parts))
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True, color_system="standard").print(picture)
    coloured = out.getvalue()
    assert "\x1b[36m" in coloured and "\x1b[35m" in coloured
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(picture)
    plain = [line.rstrip() for line in out.getvalue().splitlines()]
    assert plain == str(picture).splitlines()
