"""The commands: `weir`, `text-generation-launcher` and `python -m serving`.

Knows nothing and hands over to the launcher.
"""

import sys

from serving.launcher import launch
from serving.settings import process_environment


def main() -> None:
    """Become the server, or say in one line why not."""
    sys.exit(launch(sys.argv[1:], process_environment()))


if __name__ == "__main__":
    main()
