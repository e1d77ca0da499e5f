"""`python -m peftfx` is the command `peftfx`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
