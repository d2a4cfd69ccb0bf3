"""How student code is held: a read-only system, a confined worker per exercise, a closed format."""
