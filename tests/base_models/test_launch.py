"""How a run was launched: the wrong number of processes is told with its remedy."""

import pytest

from base_models.errors import UserError
from base_models.launch import check_processes


def test_another_number_of_processes_than_asked_for_is_refused():
    check_processes(1, 0)
    check_processes(2, 2)
    with pytest.raises(UserError, match=r"got 1 process\(es\); expected 2.*torchrun"):
        check_processes(1, 2)
