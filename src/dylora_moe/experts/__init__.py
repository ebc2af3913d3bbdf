"""The experts of a mixture as PEFT carries them: their names and states, their tensors, and adapters made of them."""
