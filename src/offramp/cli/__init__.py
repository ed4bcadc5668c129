"""The command line: ``offramp demo | inspect | fit | record | calibrate | evaluate``."""

from __future__ import annotations

from offramp.cli.app import app, main

__all__ = ["app", "main"]
