"""``python -m prunus``, and the command ``prunus``: nothing is imported outside the ``try``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is imported is Ctrl-C as well."""
    try:
        from prunus.cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("prunus: interrupted; nothing half-written is left\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
