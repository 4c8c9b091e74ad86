"""Environment variables that are on or off."""

import os


def switch(name: str) -> bool:
    """Whether an environment variable is 1. ValueError for what is neither that nor 0 nor empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment variable '{name}': expected 0 or 1, got {value!r}")
    return value == "1"
