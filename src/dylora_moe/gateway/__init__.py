"""One adapter per request for another engine: the router chooses, the engine answers."""
