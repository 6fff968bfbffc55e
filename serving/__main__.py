"""The commands: `weir`, `text-generation-launcher` and `python -m serving`.

Knows nothing and hands over to the launcher, or to the command that is named first.
"""

import sys
from importlib import import_module

from serving.launcher import launch
from serving.settings import process_environment

# Imported when called: they take seconds, and `weir --help` a few milliseconds.
COMMANDS = {
    "convert": "serving.weights.convert",
    "download-weights": "serving.weights.download",
    "plan": "serving.planning.command",
}


def main() -> None:
    """Become the server, or say in one line why not."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        sys.exit(import_module(COMMANDS[arguments[0]]).main(arguments[1:]))
    sys.exit(launch(arguments, process_environment()))


if __name__ == "__main__":
    main()
