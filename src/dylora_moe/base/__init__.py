"""The frozen base: loading it, the embedded one, and where its decoder layers are."""
