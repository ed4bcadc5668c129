"""The exits learn: objectives, schemes, and a loop that runs them."""
