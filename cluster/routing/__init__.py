"""Router's side of the data plane: the placement table in use, and splitting and combining layer calls."""
