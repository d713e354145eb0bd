"""``python -m godwit_testbed``."""

import sys

from godwit_testbed.cli import main

sys.exit(main())
