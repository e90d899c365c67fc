"""`maskwright data simulate`: what a run would do with its data, worked out without reading any."""

from tools.simulate.plan import SimulatedPlan, SimulateOptions, plan_simulation
from tools.simulate.run import Simulation, simulate

__all__ = ["SimulateOptions", "SimulatedPlan", "Simulation", "plan_simulation", "simulate"]
