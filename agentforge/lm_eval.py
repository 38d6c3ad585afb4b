"""lm-eval's own command line, which then opens artifacts: python -m agentforge.lm_eval run --model hf --model_args ...

lm-eval 0.4 has no entry points for plugins; importing agentforge.huggingface is all that is added to it.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run lm-eval with the arguments of this process; exits with 2 if it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        print("lm-eval is not installed; run pip install '.[tasks]'", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    from . import huggingface  # noqa: F401  (registers artifacts with transformers)

    cli_evaluate()


if __name__ == "__main__":
    main()
