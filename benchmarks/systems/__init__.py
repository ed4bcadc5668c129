"""The named systems, measured: one a file."""
