"""`python -m lnpu.cli`: the `lnpu` command."""

import sys

from lnpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
