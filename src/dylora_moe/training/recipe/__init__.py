"""What a run is asked to do: a YAML file as typed, checked values. Loads no model."""
