"""`python -m kdfast.cli`."""

import sys

from kdfast.cli import main

sys.exit(main())
