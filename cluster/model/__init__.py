"""The trunk: transformers' own model without its routed experts, hooked to the dispatcher, over a packed batch."""
