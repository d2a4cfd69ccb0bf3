"""Real models to quantize (floor 3): a pretrained sentence encoder, its task, and tools that see into any model."""
