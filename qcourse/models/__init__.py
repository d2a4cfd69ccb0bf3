"""Models to quantize (floor 3): architectures, pretrained weights, generation and evaluation."""
