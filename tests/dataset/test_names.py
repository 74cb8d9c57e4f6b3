"""What file names say."""

import pytest

from pipeline.dataset import names


@pytest.mark.parametrize("name", [".a.png", "b/.hidden/a.png", "__MACOSX/a.png", "b/.DS_Store"])
def test_hidden_files(name: str) -> None:
    assert names.is_hidden(name)
    assert not names.is_hidden("a.b/c__MACOSX.png")
