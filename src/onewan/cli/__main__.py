"""``python -m onewan.cli``: the command line where the `onewan` script is not on the path."""

import sys

from onewan.cli import main

sys.exit(main())
