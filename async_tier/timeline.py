"""`python -m async_tier.timeline`: see `observe.timeline`."""

import sys

from async_tier.observe.timeline import main

if __name__ == "__main__":
    sys.exit(main())
