"""The command line: ``offramp demo | inspect | plan | fit | record | calibrate | evaluate``.

And ``export | verify | bench`` for what is deployed, ``zoo`` for systems of the literature.
"""

from __future__ import annotations

from offramp.cli.app import app, main

__all__ = ["app", "main"]
