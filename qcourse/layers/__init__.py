"""Floor 4: what is put in the place of nn.Linear, and how a model that has it is saved."""
