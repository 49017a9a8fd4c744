import pickle

import pytest

from spm_hub import errors
from spm_hub.errors import NotFoundError, SpmHubError, UsageError, nearest, unknown_eraser

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SpmHubError)]


def test_an_error_ends_with_what_mends_it() -> None:
    assert str(SpmHubError("it broke", mend="spmhub doctor")) == "it broke\n  try: spmhub doctor"
    assert str(SpmHubError("it broke")) == "it broke"


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_tells_a_wrong_request_from_a_failure(kind: type[SpmHubError]) -> None:
    assert kind("x").exit_code == (2 if issubclass(kind, UsageError) else 1)


def test_an_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(NotFoundError("no snopy", mend="spmhub list")))
    assert type(error) is NotFoundError
    assert str(error) == "no snopy\n  try: spmhub list"


def test_nearest_names() -> None:
    known = ["snoopy", "mickey", "spongebob", "Van-Gogh"]
    assert nearest("snopy", known)[0] == "snoopy"
    assert nearest("van gogh", known) == ("Van-Gogh",)
    assert nearest("zzz", known) == ()


def test_a_file_that_is_not_there_is_no_concept_to_train() -> None:
    assert "spmhub train" in str(unknown_eraser("church", (), "here").mend)
    for name in ("sub folder/x.safetensors", "old.CKPT", "x.bin"):
        assert unknown_eraser(name, (), "on this disk").mend == "the path of a file that is there"
