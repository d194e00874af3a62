"""What mesh axes are for, as the rules say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

__all__ = ["Roles", "roles_of"]

Table = Mapping[str, tuple[str, ...]]

_NAMES = {
    "batch": ("batch",),
    "context": ("length",),
    "expert": ("expert", "act_expert"),
    "stage": ("stage", "act_stage"),
}


@dataclass(frozen=True)
class Roles:
    """The axes of the batch, of the context (length), of experts and of pipeline stages.

    They are what the rules give to the names `batch`, `length`, `expert` and `stage`; data
    loaders, means of losses and ring attention ask here instead of knowing axes by name.

    >>> from shardflax.partitioning import preset
    >>> preset("fsdp_tp").roles.batch
    ('data', 'fsdp')
    """

    batch: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()

    def on(self, sizes: Mapping[str, int]) -> Roles:
        """These roles on a mesh (`mesh.shape`): axes that it lacks, or of size 1, left out.

        >>> Roles(batch=("data", "fsdp"), context=("context",)).on({"fsdp": 8, "context": 1})
        Roles(batch=('fsdp',), context=(), expert=(), stage=())
        """
        return Roles(
            *(
                tuple(axis for axis in getattr(self, role.name) if sizes.get(axis, 1) > 1)
                for role in fields(self)
            )
        )


def roles_of(table: Table) -> Roles:
    """The roles that a table of rules gives.

    >>> roles_of({"batch": ("data", "fsdp?"), "length": ("context",)}).batch
    ('data', 'fsdp')
    """
    return Roles(
        *(
            tuple(dict.fromkeys(axis.rstrip("?") for name in names for axis in table.get(name, ())))
            for names in _NAMES.values()
        )
    )
