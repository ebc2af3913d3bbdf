"""`MoETrainer`: training the experts and the router of one mixture, on top of TRL. Knows no recipe but its values."""
