#!/bin/bash
# preStop hook of spot workers: tells Ray that this node goes away in $1 seconds, and leaves it that long, so that a
# training run writes a checkpoint and a generation run takes no new shard to it. Where Ray does not answer, as when the
# whole cluster is deleted, the pod goes at once.
# `ray drain-node` is hidden in Ray's help and may change: tests/infra/test_drain.py tries it with the pinned Ray.
set -euo pipefail
timeout 20 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "this pod is being deleted" \
  --deadline-remaining-seconds "$1"
sleep "$1"
