"""What a number is stored as: codes, scales, bytes, and how large the error is."""
