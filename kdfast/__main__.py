"""`python -m kdfast`: the command `kdfast`."""

import sys

from kdfast.cli import main

sys.exit(main())
