"""The error a user is meant to read, where a program ends with it."""

from __future__ import annotations

import pytest

from base_models.errors import UserError, ended


class RefusalError(UserError):
    exit_code = 1


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (RefusalError, 1)])
def test_a_program_ends_with_its_errors_code_and_one_line(kind, code, capsys):
    def main() -> int:
        raise kind("no file", "a manifest", "sample again")

    assert ended(main) == code
    assert capsys.readouterr().err == "got no file; expected a manifest; remedy: sample again\n"


def test_a_program_that_ends_well_has_its_own_code_and_other_errors_are_not_caught(capsys):
    assert ended(lambda: 3) == 3
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        ended(lambda: 1 // 0)
