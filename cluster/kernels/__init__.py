"""What CPUs compute with code of our own, compiled when it is first used, and run by torch's own threads."""
