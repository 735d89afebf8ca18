"""Ranks that fail, are interrupted, killed or stopped; and runs that go on afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support.rank_faults import ended, injected, interrupted, nested, resumed, stopped_early
from tests.support.ranks import Failed, Ranks, environment


@pytest.mark.parametrize("size", [2, 3])
def test_a_fault_at_any_exchange_is_an_error_on_all_ranks(ranks, size):
    results = ranks.run(size, injected, 100)
    assert not [r for r in results if isinstance(r, Failed)], results
    for each in zip(*results, strict=True):
        met = each[0][0]
        assert [got for _, got in each] == [met] * size
    assert sum(met for met, _ in results[0]) > 50


def test_a_fault_inside_of_another_problem_is_told_once(ranks):
    for found, error in ranks.run(3, nested):
        assert isinstance(found, Failed)
        assert error <= 1e-10


@pytest.mark.parametrize("number", [9, 13])
def test_ctrl_c_on_one_rank_gives_the_same_partial_result_on_all(ranks, number):
    results = ranks.run(3, interrupted, number)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert all(partial for partial, _, _ in results)
    assert len({products for _, products, _ in results}) == 1
    assert all(torch.equal(nodes, results[0][2]) for _, _, nodes in results)


@pytest.mark.parametrize(("estimator", "number"), [("density", 16), ("eigsh", 30), ("trace", 16), ("solve", 30)])
def test_a_run_is_resumed_to_the_same_bits(ranks, tmp_path, estimator, number):
    whole = ranks.run(2, resumed, None, estimator)
    path = str(tmp_path / "run.safetensors")
    first = ranks.run(2, stopped_early, path, estimator, number)
    assert first == [True, True], first
    results = ranks.run(2, resumed, path, estimator)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert all(torch.equal(result, whole[0]) for result in results)


def test_another_number_of_ranks_resumes_to_rounding(ranks, tmp_path):
    whole = ranks.run(2, resumed, None, "density")[0]
    path = str(tmp_path / "run.safetensors")
    assert ranks.run(3, stopped_early, path, "density", 16) == [True] * 3
    results = ranks.run(2, resumed, path, "density")
    assert not [r for r in results if isinstance(r, Failed)], results
    assert float((results[0] - whole).norm() / whole.norm()) <= 1e-10


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_ends_is_an_error_on_the_others(how):
    pool = Ranks(2, patience=3.0)
    try:
        for pipe in pool._pipes:
            pipe.send((ended, 2, (8, how)))
        assert pool._pipes[0].poll(60)
        found = pool._pipes[0].recv()
        assert isinstance(found, Failed)
        assert "GroupError" in found.kind
        assert "start the job again" in found.message
    finally:
        pool.processes[1].kill()
        pool.close()


SCRIPT = """
import os, sys
import torch, torch.distributed as dist
import curvalg.runs.checkpoint
from curvalg.distributed import start
from tests.support.rank_faults import at_exchange, resumable

curvalg.runs.checkpoint.INTERVAL = 0.0  # written whenever it can be
start()
torch.set_num_threads(1)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
open(f"{sys.argv[2]}.{attempt}", "w").close()
dies = attempt == "0" and dist.get_rank() == 1
nodes = resumable(dist.group.WORLD, sys.argv[1], 30 if dies else -1, lambda: os._exit(1))
if dist.get_rank() == 0:
    torch.save(nodes, sys.argv[2])
dist.destroy_process_group()
"""


def test_torchrun_starts_a_job_again_which_goes_on_to_the_same_bits(ranks, tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT)
    file, out = tmp_path / "run.safetensors", tmp_path / "nodes.pt"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command = [sys.executable, "-m", *launch, str(tmp_path / "job.py"), str(file), str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("nodes.pt.*"))) > 1  # attempts
    assert torch.equal(torch.load(out), ranks.run(2, resumed, None, "density")[0])
