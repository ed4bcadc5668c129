"""What exits bring when they learn, one question a file."""
