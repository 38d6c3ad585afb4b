"""python -m agentforge."""

from .cli import main

main()
