"""Training a mixture: recipes (YAML to dataclasses), data, generated skills, the trainer."""
