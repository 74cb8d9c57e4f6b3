"""`ray start` for a node that listens on 127.0.0.1 alone: the same flags, with --node-ip-address=127.0.0.1.

Ray puts the machine's outer address in place of 127.0.0.1 when it starts a node, and then its servers listen on every
interface. Only where it holds clusters for impossible (macOS, Windows, or told so by the variable below) it takes
127.0.0.1 as it is; but then it refuses to let a second node join. So this process says 127.0.0.1 by itself, and those
that it starts are told so by the variable. Needed again by every driver: `infra/cluster.py` writes it to `env`.
"""

import os
import sys

from ray._private import ray_constants, services
from ray.scripts import scripts


def main() -> None:
    """Does not return: `ray start` exits with its own code."""
    assert ray_constants.ENABLE_RAY_CLUSTER  # it has been read by now
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    services.get_node_ip_address = lambda address=None: "127.0.0.1"  # noqa: ARG005 - named so by its callers
    sys.argv[1:1] = ["start"]
    scripts.main()


if __name__ == "__main__":
    main()
