"""`python -m bigjax`."""

import sys

from bigjax.main import main

sys.exit(main())
