"""Where time goes: clock reads into preallocated ledgers, and what is told of them."""
