"""Floor 2: what the bytes cost. Plain arithmetic; nothing here needs torch."""
