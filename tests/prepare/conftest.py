"""What each test of `prepare` starts from."""

import pytest

from pipeline.prepare import cifar, idx, parquet, tree


@pytest.fixture(autouse=True)
def fresh_caches() -> None:
    """Forget the archives, batches and footers that other tests opened in this process."""
    for cached in (tree._zip, idx._images, cifar._load, parquet._footer, parquet._images):
        cached.cache_clear()
