"""Run a trained agent in your own loop: python examples/use_agent.py runs/quickstart"""

import sys

import latentplan

agent = latentplan.load(sys.argv[1])
total = 0.0
# The configuration holds the task, action repeat and renderer of training.
with latentplan.make_env(agent.config) as env:
    row, _ = env.reset()
    while not env.is_last[0]:
        action = agent.act({name: values[0] for name, values in row.obs.items()})
        row, _ = env.step(action[None])
        total += float(row.reward[0])
print(f"return {total:.1f}")
