"""How a student's code is held: a read-only system, a confined worker per exercise, and a closed wire format."""
