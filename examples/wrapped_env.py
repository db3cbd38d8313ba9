"""Change an environment with Gymnasium's own wrappers: frame skip, sticky actions, limits.

    latentplan train task=gym:WrappedPendulum-v0 env.module=examples/wrapped_env.py \
        env.repeat=1 env.episode_frames=50 env.kwargs.sticky=0.1

The registered function builds the environment and wraps it. Its parameters are set by
``env.kwargs``. The pygame package draws the pendulum.
"""

import gymnasium
from gymnasium import wrappers


def make(render_mode=None, skip=4, sticky=0.25, limit=50, largest_reward=10.0):
    """A pendulum that is observed as images.

    Args:
        render_mode: accepted and not needed, because the observation is the image.
        skip: frames that each action is repeated for. The image is the maximum of the last two.
        sticky: the probability with which the last action is repeated instead of the new one.
        limit: decisions per episode.
        largest_reward: rewards are clipped to this number and its negative.
    """
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array")
    env = wrappers.AddRenderObservation(env, render_only=True)
    env = wrappers.StickyAction(env, sticky)  # inside the skip: each frame may repeat an action
    env = wrappers.MaxAndSkipObservation(env, skip)
    env = wrappers.ClipReward(env, -largest_reward, largest_reward)
    return wrappers.TimeLimit(env, limit)


if "WrappedPendulum-v0" not in gymnasium.registry:
    gymnasium.register("WrappedPendulum-v0", make)
