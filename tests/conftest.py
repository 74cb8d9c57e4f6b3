"""Fixtures that all tests share: an isolated home, a real S3 server, one small Ray, each only if asked for."""

import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.s3_server import S3Server, run_s3_server

if "CI" not in os.environ:  # there hypothesis has a profile of its own: the same examples at every run, no deadline
    settings.register_profile("patient", deadline=None)  # a machine that others use is slow at times
    settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests neither see nor change the user's home, Ray token or AWS account."""
    home = tmp_path_factory.mktemp("home")
    token = home / ".ray" / "auth_token"  # Ray makes none where RAY_AUTH_TOKEN_PATH says
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_AUTH_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield home


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The one S3 server of the session, with one bucket."""
    with run_s3_server(tmp_path_factory.mktemp("s3-server")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_env(s3_server: S3Server) -> dict[str, str]:
    """The AWS_* environment of the server, for subprocesses."""
    return s3_server.environment()


@pytest.fixture
def s3(s3_server: S3Server, s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 URL under which nothing lies yet; AWS_* is set for the test."""
    for name, value in s3_env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def ray_session(s3_env: dict[str, str]) -> Iterator[None]:
    """One small local Ray. Its workers have the S3 server's environment; its CPUs are names, not cores."""
    with pytest.MonkeyPatch.context() as patch:
        settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}
        for name, value in (s3_env | settings).items():
            patch.setenv(name, value)
        import ray  # slow to import, and most tests do without it

        ray.init(
            address="local",  # else it would look for one that runs on this machine
            num_cpus=8,
            num_gpus=0,
            object_store_memory=200 * 10**6,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield
        ray.shutdown()
