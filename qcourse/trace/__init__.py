"""Floor 3: how a running model is seen: its linear layers, hooks, its blocks replayed one by one, a copy without weights."""
