"""`python -m runner.control.fetch REPO REVISION`: downloads what serving needs, safetensors and small files only.

Prints one line with the reason and exits with 1 when it cannot.
"""

from __future__ import annotations

import sys
from typing import Final

from huggingface_hub import snapshot_download

_NEEDED: Final = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]


def main(arguments: list[str]) -> int:
    """Download one repository into the hub cache."""
    repo, revision = arguments
    try:
        snapshot_download(repo, revision=revision, allow_patterns=_NEEDED)
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises is the reason to print
        sys.stdout.write(f"{type(error).__name__}: {str(error).splitlines()[0]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
