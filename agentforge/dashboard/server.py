"""Serves the page, to this machine only."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from pathlib import Path

from ..errors import BadInput

ADDRESS = "127.0.0.1"
WORKSPACE = "AGENTFORGE_WORKSPACE"  # the variable by which the page gets the workspace
OPTIONS = {
    "server.address": ADDRESS,
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.enableXsrfProtection": "true",
    "server.enableCORS": "true",
    "browser.gatherUsageStats": "false",
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    "client.toolbarMode": "minimal",
    "logger.hideWelcomeMessage": "true",
    "theme.light.textColor": "#000000",  # captions are a paler form of it, which must still be read
}


def check(port: int) -> None:
    """Raise BadInput if streamlit is missing, or the port is not available."""
    if importlib.util.find_spec("streamlit") is None:
        raise BadInput("the dashboard needs the package streamlit; install agentforge[dashboard]")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise BadInput(f"port {port} cannot be used ({error.strerror}); choose another --port") from None


def serve(workspace: Path, port: int) -> None:
    """Serve the page until this process is interrupted; runs are processes of their own and go on."""
    from click import Abort
    from streamlit.web import cli

    os.environ[WORKSPACE] = str(workspace)
    options = [f"--{name}={value}" for name, value in (OPTIONS | {"server.port": str(port)}).items()]
    with contextlib.suppress(Abort, KeyboardInterrupt):  # the server has shut down, and passes on why
        cli.main(["run", str(Path(__file__).with_name("hosts.py")), *options], standalone_mode=False)
