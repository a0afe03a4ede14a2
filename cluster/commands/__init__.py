"""The commands of `expertmesh`, one file each. Heavy modules are imported inside: `--help` must be quick."""
