"""Makes `topi_core` and `topi_demo` importable from wherever pytest is started."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)

if ROOT not in sys.path:
    sys.path.append(ROOT)
