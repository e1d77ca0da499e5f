"""Two processes over gloo."""
