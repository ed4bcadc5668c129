"""The parts of the runtime benchmark, one question a file."""
