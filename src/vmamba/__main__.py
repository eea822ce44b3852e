"""`python -m vmamba` is `vmamba`."""

import sys

from vmamba.cli import main

sys.exit(main())
