"""For all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("godwit", deadline=None)  # a busy machine is no slow code
settings.load_profile("godwit")
