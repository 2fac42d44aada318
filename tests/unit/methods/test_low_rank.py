"""The product of many slots' factors against each row's own product in fp64."""

from __future__ import annotations

import pytest
import torch

from graft.methods._low_rank import factors, low_rank_product, stacked_factors
from graft.methods.lora import LoraMethod
from graft.methods.routing import GroupRouting

RANK, WIDTH, OUT = 4, 48, 32
ROWS = {"one slot": (6,), "equal rows": (2, 2, 2), "uneven rows": (1, 4, 2), "one each": (1, 2, 1)}


def product_and_expected(
    num_rows: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(num_rows))
    x = torch.randn(sum(num_rows), tokens, WIDTH, generator=generator).to(dtype)
    a_SRI = torch.randn(len(num_rows), RANK, WIDTH, generator=generator)
    b_SRO = torch.randn(len(num_rows), RANK, OUT, generator=generator)
    routing = GroupRouting(
        slots=tuple(map(str, range(len(num_rows)))),
        methods=(LoraMethod(r=RANK),) * len(num_rows),
        num_rows=num_rows,
    )
    with torch.no_grad():
        given = low_rank_product(x, *stacked_factors(a_SRI, b_SRO, dtype).values(), routing)
    own = routing.slot_of_row(x.device)
    return given, x.double() @ a_SRI.double().mT[own] @ b_SRO.double()[own]


@pytest.mark.parametrize("num_rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_rows_meet_their_own_factors_alone(num_rows: tuple[int, ...], tokens: int) -> None:
    given, expected = product_and_expected(num_rows, tokens, torch.float64)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
    given, expected = product_and_expected(num_rows, tokens, torch.bfloat16)
    assert given.dtype == torch.bfloat16
    error = (given - expected).norm() / expected.norm()
    assert error < 0.01


def test_few_tokens_in_bf16_are_rounded_once_and_as_often_as_others_while_training() -> None:
    given, expected = product_and_expected((6,), 1, torch.bfloat16)
    assert torch.equal(given, expected.to(torch.bfloat16))
    factors = stacked_factors(torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.bfloat16)
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}


def test_factors_of_unlike_ranks_are_filled_up_and_have_their_own_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks, scales = (1, 4, 2), (0.5, 2.0, 1.0)

    def drawn(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    a, b = [drawn(r, 5) for r in ranks], [drawn(3, r) for r in ranks]

    def made(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(factors(given[:3], given[3:], scales, torch.float64).values())

    a_SIR, b_SRO = made(*a, *b)
    for at, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        torch.testing.assert_close(a_SIR[at, :, :rank], a[at].T)
        torch.testing.assert_close(b_SRO[at, :rank], scale * b[at].T)
        assert not a_SIR[at, :, rank:].any()
        assert not b_SRO[at, rank:].any()
    assert torch.autograd.gradcheck(made, (*a, *b))


def test_factors_in_the_bases_dtype_are_scaled_before_they_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=generator, requires_grad=True) for _ in range(2))
    made = factors([a], [b], [1.0 / 3], torch.bfloat16)
    assert torch.equal(made["b_SRO"][0], (b.T * (1.0 / 3)).to(torch.bfloat16))
    weight = torch.randn(1, 8, 8, generator=generator).to(torch.bfloat16)
    (made["b_SRO"] * weight).sum().backward()
    assert b.grad is not None
    assert b.grad.dtype == torch.float32
    torch.testing.assert_close(b.grad, weight[0].T.float() * (1.0 / 3), rtol=0, atol=0)
