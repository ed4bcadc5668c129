"""What the benchmark of deciding is made of, one question a file."""
