"""Floor 4: what notebooks show. Figures, widgets and verdicts, each a function that tests call too."""
