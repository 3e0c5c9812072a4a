"""LoRA adapters: all of a model's resident at once, each row of a batch with its own or none."""
