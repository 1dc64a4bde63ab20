"""``python -m tbfast``."""

import sys

from tbfast.cli import main

sys.exit(main())
