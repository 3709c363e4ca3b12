"""The command line: every subcommand answers --help, and a wrong one is named."""

import pytest

from nestedfp.cli import COMMANDS, build_parser, main, selected_command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"nestedfp {name}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name.split()[0] in out for name in COMMANDS)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serv"])
    assert stop.value.code == 2
    assert "serv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench", "engine", "--rows"], "bench engine"),
        (["serve", "--config", "a.yaml"], "serve"),
        (["bench"], None),
        ([], None),
    ],
)
def test_selected_command(arguments: list[str], expected: str | None) -> None:
    assert selected_command(arguments) == expected
    build_parser(None)
