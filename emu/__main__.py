"""`python -m emu` is the command `vmemu`."""

import sys

from emu.cli import main

sys.exit(main())
