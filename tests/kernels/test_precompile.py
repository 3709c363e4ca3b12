"""What `nestedfp compile kernels` compiles for the layers it is given."""

import argparse

import pytest
import torch

from nestedfp.kernels import precompile
from nestedfp.kernels.precompile import Precompiler, Recipe, needed
from nestedfp.kernels.shapes import parse_shapes


def test_gate_up_layers_are_gated_and_others_are_not() -> None:
    assert needed(parse_shapes("Llama-3.1-8B/gate_up,Llama-3.1-8B/o"), 1) == {
        (28672, 4096, True),
        (4096, 4096, False),
    }


def test_a_size_alone_gets_both_where_its_rows_form_pairs() -> None:
    assert needed(parse_shapes("4096x512,1000x512"), 1) == {
        (4096, 512, False),
        (4096, 512, True),
        (1000, 512, False),
    }


def test_parts_of_parallel_ranks_are_there() -> None:
    whole_and_parts = {(28672, 4096, True), (14336, 4096, True), (28672, 2048, True)}
    assert needed(parse_shapes("Llama-3.1-8B/gate_up"), 2) == whole_and_parts


def test_the_command_compiles_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added = []
    monkeypatch.setattr(Precompiler, "add", lambda self, *what: added.append(what))
    monkeypatch.setattr(Recipe, "compile", lambda recipe: None)
    parser = argparse.ArgumentParser()
    precompile.add_arguments(parser)
    arguments = ["--shapes", "Phi-4/gate_up,Phi-4/qkv", "--dtype", "bfloat16", "--threads", "1"]
    assert precompile.run(parser.parse_args(arguments)) == 0
    assert set(added) == {(35840, 5120, torch.bfloat16, True), (7680, 5120, torch.bfloat16, False)}


def test_a_device_without_a_table_of_its_own_is_named() -> None:
    parser = argparse.ArgumentParser()
    precompile.add_arguments(parser)
    with pytest.raises(SystemExit, match=r"'H200', which has no table of its own \(hopper-sm90-h200\.json\)"):
        precompile.run(parser.parse_args(["--device", "H200"]))
