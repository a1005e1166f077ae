"""`python -m async_tier`: the command `async-tier`."""

import sys

from async_tier.cli import main

if __name__ == "__main__":
    sys.exit(main())
