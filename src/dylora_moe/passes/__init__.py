"""Where deciding and applying meet: the hooks that route every pass, and the run of the bare base up to layer k."""
