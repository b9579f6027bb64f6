"""`python -m sdlib`: the same as the command `sdlib`."""

import sys

from sdlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
