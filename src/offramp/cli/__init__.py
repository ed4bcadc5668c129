"""The command line: ``offramp demo | inspect | fit | record | calibrate | evaluate``.

And ``export | verify | bench`` for what is deployed.
"""

from __future__ import annotations

from offramp.cli.app import app, main

__all__ = ["app", "main"]
