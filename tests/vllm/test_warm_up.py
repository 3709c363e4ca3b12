"""Which products run before an engine is ready."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nestedfp.kernels import dispatch, product
from nestedfp.kernels.dispatch import Backend, Config, Mode, Problem, configuration, table
from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8
from nestedfp.kernels.hopper.fp8 import RULE as RULE_FP8
from nestedfp.kernels.hopper.linear_16bit import RULE as RULE_16BIT
from nestedfp.kernels.layout import KOrder
from nestedfp.kernels.precompile import Precompiler, Recipe, recipes
from nestedfp.vllm.warm_up import (
    _precompiler,
    begin_compiling,
    distinct_layers,
    finish_compiling,
    run_products,
    tabled_counts,
    token_counts,
)

H100 = (9, 0)


def taken(mode: Mode, M: int, N: int, K: int, dtype: str = "float16") -> Config:
    """What a product takes on an H100, from the table or by the kernel's rule."""
    tabled = configuration(Backend.HOPPER, Problem(mode, M, N, K, dtype, KOrder.HOPPER), H100)
    if tabled is not None:
        return tabled
    config = (RULE_FP8 if mode is Mode.FP8 else RULE_16BIT).best(M, N, K)
    return config.to_dict()


@pytest.mark.parametrize("largest", [512, 2048, 8192])
@pytest.mark.parametrize(("N", "K"), [(6144, 4096), (3584, 18944)])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_kernel_is_met(mode: Mode, N: int, K: int, largest: int) -> None:
    counts = token_counts(largest, tabled_counts_of_h100())
    assert max(counts) == largest
    kind = gemm_fp8.Config if mode is Mode.FP8 else gemm_16bit.Config

    def kernels(tokens: list[int]) -> set[str]:
        return {str(kind(**taken(mode, M, N, K)).defines(torch.float16)) for M in tokens}

    assert kernels([*range(1, largest + 1, 7), largest]) <= kernels(counts)


def test_counts_for_devices_without_a_table_are_close_together_and_none_is_too_large() -> None:
    counts = token_counts(100, [])
    assert {1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 32, 47, 48, 64, 79, 80, 96, 100} <= set(counts)
    assert max(counts) == 100


@pytest.mark.parametrize(("N", "K"), [(28672, 4096), (3072, 4096), (4096, 7168)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_what_compiles_while_weights_load_is_all_that_their_products_need(
    N: int, K: int, gated: bool, dtype: torch.dtype
) -> None:
    macros = [recipe.macros for recipe in recipes(N, K, dtype, gated)]
    assert len(set(macros)) == len(macros)
    name = str(dtype).removeprefix("torch.")
    for mode, kind in ((Mode.BITS16, gemm_16bit.Config), (Mode.FP8, gemm_fp8.Config)):
        for M in [*token_counts(8192, tabled_counts_of_h100()), *range(1, 16384, 123)]:
            config = taken(mode, M, N, K, name)
            assert Recipe(mode, dtype, kind(**config), gated).macros in macros


def test_a_devices_own_table_is_met_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what compiles while weights load, by the products before service, and by the products themselves."""
    # The rule chooses none such for this weight.
    own = {"rows": 192, "warpgroups": 2, "blocks": 2, "chunks": 1, "cluster_tokens": 2, "cluster_rows": 1}
    own |= {"ctas": 1, "split": 1, "group": 1, "promote": 0, "deferred": 0}
    row = {"mode": "fp8", "dtype": "float16", "M": 777, "N": 4096, "K": 4096, "us": 1.0, "config": own}
    (tmp_path / "hopper-sm90-nvidia-h200.json").write_text(json.dumps({"header": {}, "rows": [row]}))
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100)
    names = iter(["NVIDIA H200", "NVIDIA H200", "NVIDIA H100 80GB HBM3"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: next(names))
    caches = (dispatch.table, dispatch.rows_of, product._device, product._product)

    def forget() -> None:
        for cached in caches:
            cached.cache_clear()

    forget()
    try:
        macros = Recipe(Mode.FP8, torch.float16, gemm_fp8.Config(**own)).macros
        compiled = [recipe.macros for recipe in recipes(4096, 4096, torch.float16, device="NVIDIA H200")]
        assert macros in compiled
        assert macros not in [recipe.macros for recipe in recipes(4096, 4096, torch.float16)]
        device = torch.device("cuda")
        problem = Problem(Mode.FP8, 777, 4096, 4096, "float16", KOrder.HOPPER)
        _, taken = product._product(problem, *product._device(device))
        assert taken.keywords["config"] == own
        assert [tabled_counts(device) for _ in range(2)] == [{777}, set()]
    finally:
        forget()


def test_gated_products_need_pieces_of_their_own() -> None:
    plain, gated = (recipes(28672, 4096, torch.float16, gated) for gated in (False, True))
    assert {recipe.gated for recipe in gated} == {True}
    assert not {recipe.macros for recipe in plain} & {recipe.macros for recipe in gated}
    precompiler = Precompiler(threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "compile", lambda recipe: None)
        for variant in (True, True, False):
            precompiler.add(28672, 4096, torch.float16, variant)
        precompiler.wait()
    assert len(precompiler) == len(plain) + len(gated)


def tabled_counts_of_h100() -> set[int]:
    return {row.M for row in table(Backend.HOPPER, H100)}


def test_each_piece_is_compiled_once_and_complaints_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[object, ...]] = []

    def compile_one(recipe: Recipe) -> None:
        compiled.append(recipe.macros)
        if recipe.mode is Mode.FP8:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(Recipe, "compile", compile_one)
    precompiler = Precompiler(threads=2)
    for _ in range(3):
        precompiler.add(4096, 4096, torch.float16)
    complaints = precompiler.wait()
    assert len(compiled) == len(set(compiled)) == len(precompiler)
    assert complaints == ["no compiler"] * sum(macros[0] is Mode.FP8 for macros in compiled)


def test_a_weight_on_a_cpu_compiles_nothing() -> None:
    begin_compiling(torch.device("cpu"), 64, 64, torch.float16, gated=False)
    finish_compiling()
    assert _precompiler.cache_info().currsize == 0


class Method:
    def __init__(self, gated: bool) -> None:
        self.gated = gated
        self.seen: list[tuple[int, bool]] = []

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.seen.append((x.shape[0], bias is not None))
        return x


def layer(N: int, K: int, bias: bool = False, gated: bool = False) -> nn.Module:
    module = nn.Module()
    module.weight_upper = nn.Parameter(torch.zeros(N, K, dtype=torch.uint8), requires_grad=False)
    module.bias = nn.Parameter(torch.zeros(N)) if bias else None
    module.quant_method = Method(gated)
    return module


def test_one_layer_of_each_shape_runs_at_every_count() -> None:
    model = nn.ModuleDict(
        {str(i): nn.ModuleDict({"qkv": layer(6, 4, bias=True), "o": layer(4, 4)}) for i in range(3)}
    )
    model["head"] = nn.Linear(4, 8)
    model["gated"] = nn.ModuleDict({"o": layer(4, 4, gated=True)})
    layers = distinct_layers(model)
    assert [tuple(found.weight_upper.shape) for found in layers] == [(6, 4), (4, 4), (4, 4)]
    assert [found.quant_method.gated for found in layers] == [False, False, True]
    run_products(layers, [1, 5], torch.float16)
    assert layers[0].quant_method.seen == [(1, True), (5, True)]
    assert layers[1].quant_method.seen == layers[2].quant_method.seen == [(1, False), (5, False)]
