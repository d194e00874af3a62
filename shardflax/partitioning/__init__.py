"""Layouts: logical names -> rules -> mesh axes, resolved and checked on abstract shapes.

*axis* is a mesh axis, *dim* a dimension of an array, *name* the logical name of a dim.
"""

from shardflax.partitioning.at_use import at_use, with_weight
from shardflax.partitioning.batch import batch_axes, batch_sharding
from shardflax.partitioning.boxes import PARTITION_NAME, LogicallyPartitioned, Partitioned
from shardflax.partitioning.communication import Collective, assert_collectives, collectives
from shardflax.partitioning.communication_table import (
    communication_json,
    communication_table,
    communication_text,
)
from shardflax.partitioning.compare import Comparison, PresetCost, compare_presets
from shardflax.partitioning.constraints import constrain, with_logical_constraint
from shardflax.partitioning.defaults import DefaultNames, default_names
from shardflax.partitioning.diagnostics import Diagnostics, compile, compile_diagnostics
from shardflax.partitioning.errors import (
    AxisConflictError,
    CollectivesError,
    IndivisibleDimError,
    InvalidRuleError,
    LayoutError,
    LibtpuError,
    LockDriftError,
    LockFileError,
    MeshScopeError,
    MeshSpecError,
    NamesRankError,
    NoRulesWarning,
    OverrideError,
    PartitioningUnspecifiedError,
    PartitionNameMismatchError,
    Problem,
    RematerializationError,
    RematerializationWarning,
    RepeatedNameError,
    SilentReplicationError,
    TreeMismatchError,
    UnknownAxisError,
    UnknownNameError,
    UnknownPresetError,
    UnknownTopologyError,
)
from shardflax.partitioning.explained import (
    AxisExplained,
    DimExplained,
    LeafExplained,
    MeshExplained,
)
from shardflax.partitioning.explanation import Explanation, explain
from shardflax.partitioning.importers import (
    ImportedRules,
    from_levanter,
    from_maxtext,
    from_t5x,
)
from shardflax.partitioning.init import abstract_layout, init_sharded
from shardflax.partitioning.init_plan import InitPlan, plan_init
from shardflax.partitioning.layout import Layout
from shardflax.partitioning.leaf import Leaf
from shardflax.partitioning.linen_rules import RulesFallback
from shardflax.partitioning.lock_file import check_lock, lock, read_lock, write_lock
from shardflax.partitioning.locked import LockedCollective, LockedLeaf, LockEntry
from shardflax.partitioning.mesh import make_abstract_mesh, make_mesh
from shardflax.partitioning.named import (
    LogicalInit,
    MeshInit,
    NamedInit,
    named,
    with_logical_partitioning,
    with_partitioning,
)
from shardflax.partitioning.picture import MeshPicture, mesh_picture
from shardflax.partitioning.presets import DEFAULT_RULES, PRESETS, preset
from shardflax.partitioning.rematerialization import Rematerialization
from shardflax.partitioning.replication import Replication, assert_compiled, check_compiled
from shardflax.partitioning.reshard import reshard
from shardflax.partitioning.resolve import DimRecord, Resolution, resolve
from shardflax.partitioning.roles import Roles
from shardflax.partitioning.rules import AxisRules, LogicalRules
from shardflax.partitioning.scope import (
    get_logical_axis_rules,
    logical_axis_rules,
    set_logical_axis_rules,
    use,
)
from shardflax.partitioning.slices import fake_slices, networks, slices_of
from shardflax.partitioning.specs import (
    get_partition_spec,
    get_sharding,
    logical_to_mesh,
    logical_to_mesh_axes,
    logical_to_mesh_sharding,
)
from shardflax.partitioning.summary_columns import TableSharding, table_sharding
from shardflax.partitioning.topology import libtpu_requirement, libtpu_version, tpu_topology
from shardflax.partitioning.usage import RuleUsage, UsedRule, rule_usage
from shardflax.partitioning.vocabulary import KNOWN_AXES

__all__ = [
    "DEFAULT_RULES",
    "KNOWN_AXES",
    "PARTITION_NAME",
    "PRESETS",
    "AxisConflictError",
    "AxisExplained",
    "AxisRules",
    "Collective",
    "CollectivesError",
    "Comparison",
    "DefaultNames",
    "Diagnostics",
    "DimExplained",
    "DimRecord",
    "Explanation",
    "ImportedRules",
    "IndivisibleDimError",
    "InitPlan",
    "InvalidRuleError",
    "Layout",
    "LayoutError",
    "Leaf",
    "LeafExplained",
    "LibtpuError",
    "LockDriftError",
    "LockEntry",
    "LockFileError",
    "LockedCollective",
    "LockedLeaf",
    "LogicalInit",
    "LogicalRules",
    "LogicallyPartitioned",
    "MeshExplained",
    "MeshInit",
    "MeshPicture",
    "MeshScopeError",
    "MeshSpecError",
    "NamedInit",
    "NamesRankError",
    "NoRulesWarning",
    "OverrideError",
    "PartitionNameMismatchError",
    "Partitioned",
    "PartitioningUnspecifiedError",
    "PresetCost",
    "Problem",
    "Rematerialization",
    "RematerializationError",
    "RematerializationWarning",
    "RepeatedNameError",
    "Replication",
    "Resolution",
    "Roles",
    "RuleUsage",
    "RulesFallback",
    "SilentReplicationError",
    "TableSharding",
    "TreeMismatchError",
    "UnknownAxisError",
    "UnknownNameError",
    "UnknownPresetError",
    "UnknownTopologyError",
    "UsedRule",
    "abstract_layout",
    "assert_collectives",
    "assert_compiled",
    "at_use",
    "batch_axes",
    "batch_sharding",
    "check_compiled",
    "check_lock",
    "collectives",
    "communication_json",
    "communication_table",
    "communication_text",
    "compare_presets",
    "compile",
    "compile_diagnostics",
    "constrain",
    "default_names",
    "explain",
    "fake_slices",
    "from_levanter",
    "from_maxtext",
    "from_t5x",
    "get_logical_axis_rules",
    "get_partition_spec",
    "get_sharding",
    "init_sharded",
    "libtpu_requirement",
    "libtpu_version",
    "lock",
    "logical_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_axes",
    "logical_to_mesh_sharding",
    "make_abstract_mesh",
    "make_mesh",
    "mesh_picture",
    "named",
    "networks",
    "plan_init",
    "preset",
    "read_lock",
    "reshard",
    "resolve",
    "rule_usage",
    "set_logical_axis_rules",
    "slices_of",
    "table_sharding",
    "tpu_topology",
    "use",
    "with_logical_constraint",
    "with_logical_partitioning",
    "with_partitioning",
    "with_weight",
    "write_lock",
]
