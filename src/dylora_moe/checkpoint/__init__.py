"""Files: mixtures and stock adapters, written, read and checked as plain data. Nothing here knows the model."""
