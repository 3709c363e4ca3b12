"""The token that guards a Ray: whether this process has one, and whether Ray sends it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_MODE: Final = "RAY_AUTH_MODE"
_VARIABLES: Final = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def given() -> bool:
    """Whether Ray finds a token: in a variable, in the file that one names, or in Ray's own file."""
    named = any(os.environ.get(variable) for variable in _VARIABLES)
    return named or (Path.home() / ".ray" / "auth_token").exists()


def sent() -> bool:
    """Whether Ray sends the token: it does so in the mode `token` alone."""
    return given() and os.environ.get(_MODE, "").lower() == "token"


def heed() -> None:
    """Have a token sent where RAY_AUTH_MODE says nothing. Ray reads the mode when it is imported: call this
    before.
    """
    if given():
        os.environ.setdefault(_MODE, "token")
