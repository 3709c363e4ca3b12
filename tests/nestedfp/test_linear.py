"""The linear product at both precisions against float64."""

import pytest
import torch

from nestedfp import Precision, nest, nested_linear


def operands(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(M + N + K)
    x, w, bias = (torch.randn(*shape, generator=generator) for shape in ((M, K), (N, K), (N,)))
    return x.to(dtype), (w * 0.05).to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8, 64), (3, 40, 100), (70, 96, 576)])
def test_sixteen_bits_match_the_plain_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, bias = operands(*shape, dtype)
    y = nested_linear(x, nest(w, require_exact=False), bias)
    reference = x.double() @ w.double().t() + bias.double()
    assert y.dtype == dtype
    error = (y.double() - reference).norm() / reference.norm()
    plain = (torch.nn.functional.linear(x, w, bias).double() - reference).norm() / reference.norm()
    assert error <= 1.05 * plain + 1e-6


def test_fp8_multiplies_the_quantised_operands() -> None:
    x, w, bias = operands(17, 48, 320, torch.float16)
    weight = nest(w)
    codes, row_scale = weight.fp8()
    token_scale = x.float().abs().amax(dim=1, keepdim=True) / 448
    quantised = (x.float() / token_scale).to(torch.float8_e4m3fn)
    tokens = quantised.double() * token_scale.double()
    reference = tokens @ (codes.double() * row_scale.double()[:, None]).t()
    y = nested_linear(x, weight, bias, Precision.FP8)
    exact = x.double() @ w.double().t()
    quantisation = (reference - exact).norm() / exact.norm()
    assert 1e-3 < quantisation < 0.1
    # Activations that lie on a tie between two codes may fall either way.
    assert (y.double() - reference - bias.double()).norm() / reference.norm() < 0.2 * quantisation


def test_leading_dimensions_are_kept() -> None:
    x, w, _ = operands(12, 16, 64, torch.float16)
    weight = nest(w)
    batched = nested_linear(x.view(3, 4, 64), weight)
    assert batched.shape == (3, 4, 16)
    assert torch.equal(batched.view(12, 16), nested_linear(x, weight))


def test_activations_of_another_dtype_are_refused() -> None:
    x, w, _ = operands(2, 16, 64, torch.float16)
    with pytest.raises(TypeError, match="bfloat16"):
        nested_linear(x.bfloat16(), nest(w))
