"""Plans of runs: memory, traffic, work and time before anything is computed."""

from curvalg.planning.run_plan import MemoryPlan, RunPlan, TrafficPlan, plan_run
from curvalg.planning.workload import PassWork, StageWork, UnitSizes, Workload

__all__ = ["MemoryPlan", "PassWork", "RunPlan", "StageWork", "TrafficPlan", "UnitSizes", "Workload", "plan_run"]
