"""The process of a run: `agentforge pipeline`, with what the chain logs on stderr."""

from __future__ import annotations

import logging
import signal

from .. import cli


def main() -> None:
    """Run the command line.  A run is paused by SIGINT, which a dashboard that a shell has put into the background, and so
    all that it starts, would ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("agentforge").setLevel(logging.INFO)
    cli.main()


if __name__ == "__main__":
    main()
