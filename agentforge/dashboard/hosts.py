"""What Streamlit serves: the page, to whoever asks for it by this machine's own name.

A page from elsewhere whose name leads to 127.0.0.1 by now (DNS rebinding) is of one origin with this one for the browser;
its requests give themselves away by their Host alone.
"""

from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from streamlit import App

from agentforge.dashboard.server import ADDRESS

app = App(
    Path(__file__).with_name("app.py"),
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"], www_redirect=False)],
)
