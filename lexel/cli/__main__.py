"""`python -m lexel.cli`."""

import sys

from lexel.cli import main

if __name__ == "__main__":
    sys.exit(main())
