"""What code would leave behind if it ran."""

import os
from pathlib import Path


class Payload:
    """Makes the canary's folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)
