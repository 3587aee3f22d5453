"""A Ray cluster of several nodes on this machine, in a process of its own.

Started as `python cluster.py NODES CPUS`; prints its address and the folder of its logs. Reads from its standard input,
a line each: `kill` (a node that is not the head), `gone` (everything is killed); answers each with a line.
"""

from __future__ import annotations

import logging
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    nodes, cpus = int(sys.argv[1]), float(sys.argv[2])
    out, sys.stdout = sys.stdout, sys.stderr  # what Ray prints is no answer

    def told(line: str) -> None:
        out.write(f"{line}\n")
        out.flush()

    size = {"num_cpus": cpus, "object_store_memory": 100 * 1024 * 1024}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    others = [cluster.add_node(**size) for _ in range(nodes - 1)]
    told(f"{cluster.address} {cluster.head_node.get_session_dir_path()}")
    for line in sys.stdin:
        match line.strip():
            case "kill":
                cluster.remove_node(others.pop(), allow_graceful=False)
            case "gone":
                for node in [*others, cluster.head_node]:
                    node.kill_all_processes(check_alive=False, allow_graceful=False)
        told("done")
    cluster.shutdown()
