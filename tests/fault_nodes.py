"""Two nodes, each a torchrun of its own: one is killed with all it runs and comes back; the job ends as it would have.

The nodes are on this machine (gloo) and meet in a store that neither of them hosts.
"""

from __future__ import annotations

import re
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import fault_launch
import fault_runs
import torch.distributed as dist
from runs import assert_same_run

SHORT = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=1,is_host=0"


def campaign(times: int, seed: int) -> dict[str, object]:
    """Kills node 1 and node 0 in turn, `times` times in all, within one job."""
    with tempfile.TemporaryDirectory(prefix="mealfast-nodes-") as name, ExitStack() as nodes:
        root = Path(name)
        fields = fault_runs.tiny_fields(
            root, epochs=60, lr_decay_epochs=(4,), checkpoint_every=5, eval_every=0, collective_timeout=120
        )
        whole, killed, log = root / "whole", root / "killed", root / "log"
        work = fault_launch.write_work(root / "whole.json", ({**fields, "run_dir": str(whole)}, None))
        single = fault_launch.command(work, "--standalone", "--nproc-per-node", "2")
        with fault_launch.launched(single, log) as process:
            assert process.wait(300) == 0, log.read_text()[-4000:]
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10))
        work = fault_launch.write_work(root / "killed.json", ({**fields, "run_dir": str(killed)}, None))
        argv = fault_launch.command(
            work, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(times + 1),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{store.port}", "--rdzv-id", "job",
            "--rdzv-conf", SHORT,
        )  # fmt: skip

        def start(number: int):
            # Each round gets a store of its own: torch 2.15's shared one does not let a lost node back in.
            launch = fault_launch.launched(argv, root / f"log-{number}", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            return nodes.enter_context(launch)

        running = [start(0), start(1)]
        lost, seconds = [], []
        for number in range(times):
            goal = max(fault_runs.trained_lines(killed), default=0) + 20
            fault_launch.wait_until(lambda goal=goal: newest_line(killed) >= goal, 240, root / "log-0")
            victim = 1 - number % 2
            began = time.monotonic()
            fault_launch.kill_tree(running[victim].pid)
            running[victim].wait()
            reached = newest_line(killed) + 1
            running[victim] = start(victim)
            fault_launch.wait_until(
                lambda number=number: len(resumptions(root)) > number, 240, root / f"log-{1 - victim}"
            )
            seconds.append(time.monotonic() - began)
            lost.append(reached - resumptions(root)[-1])
        for number, node in enumerate(running):
            assert node.wait(300) == 0, (root / f"log-{number}").read_text()[-4000:]
        assert_same_run(killed, whole)
        return {
            "fault": "SIGKILL of one of two nodes (torchrun and its worker), which comes back",
            "injected": times,
            "outcome": f"the job went on within {max(seconds):.0f} s; files bit-identical to a run left alone",
            "lost": f"{max(lost)} steps at most",
        }


def newest_line(run_dir: Path) -> int:
    return max(fault_runs.trained_lines(run_dir), default=0)


def resumptions(root: Path) -> list[int]:
    """The steps after which the job has gone on, ascending, from the logs of both nodes."""
    text = "".join((root / f"log-{number}").read_text() for number in range(2))
    return sorted(int(step) for step in re.findall(r"resuming after (\d+) of", text))
