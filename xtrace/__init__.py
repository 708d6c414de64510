"""xtrace."""
