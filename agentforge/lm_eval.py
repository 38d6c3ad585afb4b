"""lm-eval's own command line, which then opens artifacts: python -m agentforge.lm_eval run --model hf --model_args ...

lm-eval 0.4 has no entry points for plugins; importing agentforge is all that is added to it.
"""

from __future__ import annotations

import importlib.util

from .errors import BadInput


def main() -> None:
    """Run lm-eval with the arguments of this process.  Raises BadInput where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput("lm-eval is not installed; install agentforge[tasks]")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
