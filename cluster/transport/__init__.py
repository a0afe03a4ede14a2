"""Links between routers and expert groups: one protocol class, the gRPC stream, and the in-process fake."""
