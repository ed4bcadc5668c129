"""Stopping saves the time: stages, the runner, engines, and the file to deploy."""
