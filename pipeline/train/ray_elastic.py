"""A group of workers that follows the cluster: Ray Train's elastic policy, kept from taking what the feed needs.

Its own policy would leave no CPU to read, starts workers on nodes that drain, and learns of new ones up to 20 s late.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

_ROUNDING = 1e-6


def possible_workers(nodes: Mapping[str, Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many workers of `each` resources fit on nodes (name → resources) and leave one CPU free to read."""
    fits = [min(int(node.get(kind, 0.0) / need + _ROUNDING) for kind, need in each.items()) for node in nodes.values()]
    spare = sum(node.get("CPU", 0.0) for node in nodes.values()) - 1
    return max(0, min(sum(fits), int(spare / each["CPU"] + _ROUNDING)))


class _LeavesRoomToRead(ElasticScalingPolicy):
    """Counts whole machines: an elastic run has its cluster to itself, as a RayJob has."""

    _running = False

    def make_decision_for_running_worker_group(self, *group: Any, **more: Any) -> Any:
        self._running = True
        return super().make_decision_for_running_worker_group(*group, **more)

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._running = False
        return super().make_decision_for_non_running_worker_group()

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:  # noqa: ARG002
        # A group at work goes on to the end of a node that drains: it has a checkpoint to write.
        left = {} if self._running else ray_state.get_draining_nodes()
        living = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left)
        nodes = {node["NodeID"]: node["Resources"] for node in living}
        config = self.scaling_config
        return min(possible_workers(nodes, config._resources_per_worker_not_none), config.max_workers)


class ElasticTrainer(TorchTrainer):
    """TorchTrainer with that policy; for `ScalingConfig(num_workers=(min, max))`."""

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        policy = _LeavesRoomToRead(self.scaling_config)
        return super()._initialize_and_run_controller(**{**controller, "scaling_policy": policy})
