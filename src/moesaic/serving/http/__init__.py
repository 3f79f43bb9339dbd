"""An OpenAI-compatible server over one loaded model: requests join and leave a running batch between steps.

`engine` runs the model in a thread of its own, `app` speaks HTTP, `server` starts and stops both. What is imported here
needs no extra; the modules that do are imported after `require`.
"""

from __future__ import annotations

import importlib

from moesaic.core.errors import BadInput


def require() -> None:
    """Raises BadInput with the one line to type when the `serve` extra is not installed."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BadInput(f"the server needs {module}: pip install 'moesaic[serve]'") from error
