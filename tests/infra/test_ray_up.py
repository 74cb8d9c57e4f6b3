"""infra/ray-up-aws.yaml: Ray's own schema takes it, and it opens nothing."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from jobs import submit
from tests.infra.rendering import INFRA, ROOT, load, mappings

SPOT = {"MarketType": "spot"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The file."""
    (document,) = load(INFRA / "ray-up-aws.yaml")
    return document


def test_rays_schema_takes_it(config: dict[str, Any]) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(config)] == []
    wrong = config | {"no_such_field": 1}
    assert [error.message for error in Draft7Validator(schema).iter_errors(wrong)]


def test_every_start_is_with_the_token_and_only_loopback_is_served(config: dict[str, Any]) -> None:
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command.partition("ray start")[0]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert "0.0.0.0" not in (INFRA / "ray-up-aws.yaml").read_text()
    assert config["provider"]["use_internal_ips"] is True


def test_nodes_know_the_region_and_get_no_secret_of_another_cluster(config: dict[str, Any]) -> None:
    """Of `make cluster` there may be a token, keys and a whole store in the checkout."""
    for command in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        assert f"AWS_REGION={config['provider']['region']} " in command.partition("ray start")[0]
    left_out = {name.rstrip("*") for name in config["rsync_exclude"]}
    assert {name.removeprefix("/").removesuffix("-peers") for name in submit._NOT_CARRIED} <= left_out


def test_every_node_is_in_a_security_group_of_the_readers_own(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_the_head_does_no_work_and_spot_comes_first(config: dict[str, Any]) -> None:
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][1]
    spot = {name for name, kind in kinds.items() if kind["node_config"].get("InstanceMarketOptions") == SPOT}
    assert spot == {"gpu-spot"}
    assert kinds["gpu-spot"]["priority"] > kinds["gpu-on-demand"]["priority"]
    assert kinds["gpu-spot"]["resources"] == kinds["gpu-on-demand"]["resources"]
    assert kinds["cpu-ingest"]["min_workers"] >= 1
    assert config["max_workers"] >= kinds["cpu-ingest"]["min_workers"] + kinds["gpu-on-demand"]["max_workers"]


def test_ids_are_placeholders(config: dict[str, Any]) -> None:
    text = json.dumps(config)
    for word in re.findall(r"(?:ami|sg|subnet)-[0-9a-f]+", text):
        assert set(word.partition("-")[2]) == {"0"}
    for arn in re.findall(r"arn:aws:iam::(\d+):(\S+?)\"", text):
        assert arn[0] == "000000000000"
        assert "EXAMPLE" in arn[1]
    names = [m[key] for m in mappings(config) for key in ("KeyName", "ssh_private_key") if key in m]
    assert all("EXAMPLE" in name for name in names)


def test_what_is_installed_is_in_the_repository(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["/home/ubuntu/ganymede"] == "."
    named = re.findall(r"~/ganymede/([\w./-]+)", " ".join(config["setup_commands"]))
    assert named
    for path in named:
        assert (ROOT / path).is_file()
