"""Who does something, for the record."""

from __future__ import annotations

import os
import pwd


def this_user() -> str:
    """The name of whoever runs this process, by the system and not by the environment."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
