"""Floor 3: look into a running model: its linear layers, hooks, a replay of it, a copy of it."""
