"""``python -m onewan``: the command line, where the `onewan` script is not on the path."""

import sys

from onewan.cli import main

if __name__ == "__main__":
    sys.exit(main())
