"""What every test shares. Small on purpose: helpers live in ``tests/helpers.py``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # so that ``tests.helpers`` is importable however pytest was started
    sys.path.insert(0, str(ROOT))

_CACHE = tempfile.TemporaryDirectory(prefix="fieldfleet-cache-")  # what is measured here is not kept
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests compare bits; two cores serve many processes

from fl_core.contracts.offswitches import set_off_switches  # noqa: E402

set_off_switches()

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "fieldfleet",
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fieldfleet")
