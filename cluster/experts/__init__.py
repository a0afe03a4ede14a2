"""Expert groups: their weights, their compute thread, their data-plane server, their Serve shell."""
