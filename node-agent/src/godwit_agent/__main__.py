"""``python -m godwit_agent``."""

import sys

from godwit_agent.main import main

sys.exit(main())
