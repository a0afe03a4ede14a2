"""Linear layers that get the same rows are computed in one call, and others as if nobody had thought of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cluster.kernels import tiles_compiled
from cluster.kernels.compiling import digest
from cluster.kernels.linear import ROWS, Family, FastLinear, FastNorm, KernelTable
from cluster.kernels.tiles import TiledWeights, can_tile

TABLE = KernelTable(dict.fromkeys(ROWS, (1.0, 0.5)))
Order = Callable[[list[FastLinear], torch.Tensor, torch.Tensor], list[torch.Tensor]]

pytestmark = pytest.mark.skipif(not can_tile(torch.zeros(4, 16)), reason="nothing can be compiled here")


def linears(*outputs: int, inputs: int = 64, bias: bool = True) -> list[FastLinear]:
    return [FastLinear(torch.randn(n, inputs), torch.randn(n) if bias else None, TABLE) for n in outputs]


def plain(linear: FastLinear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear._weight, linear._bias)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 23, 130])
def test_products_side_by_side(rows: int) -> None:
    weights, x = [torch.randn(n, 1024) for n in (4, 100, 32, 68)], torch.randn(rows, 1024)
    for weight, got in zip(weights, TiledWeights(weights).products(x), strict=True):
        assert close(got, x @ weight.T)


def test_those_that_get_the_same_are_computed_together() -> None:
    members = linears(32, 8, 12)
    Family(members)
    for number in range(4):
        x = torch.randn(1, 3 + number, 64)
        for member in members:
            assert close(member(x), plain(member, x))
    family = members[0].family
    assert family is not None
    x = torch.randn(2, 64)
    members[0](x)
    for member in members[1:]:  # what has been computed already is what they give
        family._products[id(member)].fill_(7.0)
        assert close(member(x), torch.full((2, member._outputs), 7.0) + member._bias)
    assert family._rows is None
    assert not family._products


def another(members: list[FastLinear], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The last one gets something else."""
    return [members[0](x), members[1](x), members[2](y)]


def in_between(members: list[FastLinear], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """It comes before another one that gets the same."""
    first, other = members[0](x), members[2](y)
    return [first, members[1](x), other]


@pytest.mark.parametrize("order", [another, in_between])
def test_whoever_gets_something_else_is_left_out(order: Order) -> None:
    members = linears(32, 8, 12)
    Family(members)
    for _ in range(4):
        x, y = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
        got = order(members, x, y)
        for member, given, result in zip(members, (x, x, y), got, strict=True):
            assert close(result, plain(member, given))
    assert members[2].family is None
    assert members[1].family is not None


def test_rows_that_are_changed_between_two_calls_are_noticed() -> None:
    members = linears(32, 8)
    Family(members)
    for _ in range(4):
        x = torch.randn(1, 3, 64)
        before = x.clone()
        assert close(members[0](x), plain(members[0], before))
        x.mul_(2.0)
        assert close(members[1](x), plain(members[1], x))


def test_later_rounds_may_be_others_than_the_one_that_was_learned_from() -> None:
    members = linears(32, 8, 12)
    Family(members)
    x, y = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    for member in (*members, members[0]):
        member(x)
    assert close(members[1](y), plain(members[1], y))  # not what the first one got
    assert close(members[0](y), plain(members[0], y))
    assert close(members[0](x), plain(members[0], x))  # the others were not asked
    assert close(members[2](x), plain(members[2], x))
    assert close(members[2](x), plain(members[2], x))  # twice


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 3, 5, 64), (700, 64), (0, 64)])
def test_norms_are_torchs(shape: tuple[int, ...]) -> None:
    weight, x = torch.randn(64), 3 * torch.randn(shape)
    expected = F.rms_norm(x, (64,), weight, 1e-5)
    norm = FastNorm(weight, 1e-5)
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    apart = torch.randn(*shape[:-1], 128)[..., ::2]
    assert torch.allclose(norm(apart), F.rms_norm(apart, (64,), weight, 1e-5), rtol=1e-5, atol=1e-6)


def test_a_norm_keeps_what_is_not_finite_in_its_row() -> None:
    x = torch.randn(3, 64)
    x[1, 7] = float("nan")
    got = FastNorm(torch.randn(64), 1e-6)(x)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_a_norm_refuses_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="64"):
        FastNorm(torch.randn(64), 1e-6)(torch.randn(2, 32))


def test_what_was_compiled_of_other_sources_is_not_used(tmp_path: Path) -> None:
    """numba looks at the file of a function alone, which may hold constants of others."""
    for name, text in (("a.py", "A = 1"), ("b.py", "B = 2")):
        (tmp_path / name).write_text(text)
    before = digest(tmp_path)
    (tmp_path / "b.py").write_text("B = 3")
    assert digest(tmp_path) != before
    assert digest(Path(tiles_compiled.__file__).parent) in str(tiles_compiled.run._cache.cache_path)
