"""python -m kdfast: the command line where no script is installed."""

import sys

from kdfast.cli import main

sys.exit(main())
