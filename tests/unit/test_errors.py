from __future__ import annotations

import pickle

import grpc
import pytest

from cluster import errors
from cluster.api.status import grpc_status

KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.ExpertMeshError)]


def example(kind: type[errors.ExpertMeshError]) -> errors.ExpertMeshError:
    if kind is errors.InvalidArgument:
        return errors.InvalidArgument("top_p", 2.0, "must be at most 1")
    if kind is errors.MissingExperts:
        return errors.MissingExperts(1, 2, [3, 4])
    return kind("what happened")


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_grpc_status_is_in_the_tree_and_survives_pickling(
    kind: type[errors.ExpertMeshError],
) -> None:
    error = example(kind)
    assert grpc_status(error)[0] is grpc.StatusCode[kind.code]
    assert kind is errors.ExpertMeshError or kind.__name__ in str(errors.__doc__)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_long_value_is_shortened() -> None:
    assert len(str(errors.InvalidArgument("stop", "x" * 10_000, "must be short"))) < 120
