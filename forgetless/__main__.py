"""``python -m forgetless``: the command line."""

import sys

from forgetless.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
