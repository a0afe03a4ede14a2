"""Engines that users would otherwise pick, each in a virtual environment of its own, to be measured beside ours."""
