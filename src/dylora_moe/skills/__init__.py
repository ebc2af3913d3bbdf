"""What the mixture knows of its skills: running sums of frozen features, and the router computed from them."""
