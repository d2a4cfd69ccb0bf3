"""What bytes cost in memory, time and GPUs: plain arithmetic that needs no torch."""
