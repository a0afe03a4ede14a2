"""Is this machine, or each host of this cluster, fit to serve; and what to do where it is not."""
