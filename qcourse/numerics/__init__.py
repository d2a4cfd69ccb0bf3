"""Floor 1: what a number is stored as. Codes, scales, bytes, and how far they are from the numbers they stand for."""
