"""`python -m hbfp` is `hbfp`."""

import sys

from hbfp.tools.cli import main

sys.exit(main())
