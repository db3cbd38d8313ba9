"""Use a trained agent in a loop of your own: python examples/use_agent.py runs/quickstart"""

import sys

import latentplan
from latentplan.envs import make_vector

agent = latentplan.load(sys.argv[1])
config = agent.config  # the same task, action repeat and renderer as in training
total = 0.0
with make_vector(config.task, config.obs, config.env, count=1, seed=0, mode="eval") as env:
    row, _ = env.reset()
    while not env.is_last[0]:
        action = agent.act({name: values[0] for name, values in row.obs.items()})
        row, _ = env.step(action[None])
        total += float(row.reward[0])
print(f"return {total:.1f}")
