"""Where exits go: evenly over the cost, or where a search finds that they pay."""
