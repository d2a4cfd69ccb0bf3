"""Files that other programs write and read, as our quantized tensors."""
