"""Tests on kernels that are not this machine's, in a virtual machine."""
