"""ExpertMesh: mixture-of-experts models served with their experts spread over a Ray cluster.

The distribution and the command are called ``expertmesh``; the import package is ``cluster``.
"""

__version__ = "0.7.0"
