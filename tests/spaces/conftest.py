"""The Space is a repository of its own: its files import each other by their bare names, as on the Hub."""

import sys
from pathlib import Path

SPACE = Path(__file__).parents[2] / "spaces"
if str(SPACE) not in sys.path:
    sys.path.insert(0, str(SPACE))
