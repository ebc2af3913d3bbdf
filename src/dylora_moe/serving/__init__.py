"""Many requests to one mixture at once."""
