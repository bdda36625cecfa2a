"""Whether tests run in full: SVF_LONG=1."""

from __future__ import annotations

import os

LONG = os.environ.get("SVF_LONG", "") not in ("", "0")
