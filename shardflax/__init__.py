"""Neural networks for JAX in which the layout over a device mesh is checked before anything runs.

`shardflax.nn` has modules, layers and lifted transforms, `shardflax.partitioning` meshes, rules and
layouts, `shardflax.training` steps and data, `shardflax.ckpt` checkpoints, `shardflax.models` whole
architectures.  `shardflax.core` is what they stand on.
"""

__all__: list[str] = []
