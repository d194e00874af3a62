"""`python -m shardflax`: the command line, as the script `shardflax` is."""

import sys

from shardflax.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
